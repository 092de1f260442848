-- Says that an attempt is alive, while it is its worker's.
-- KEYS: 1 record   ARGV: 1 attempt, 2 owner   Returns 1, or 0 when it is not theirs
local record = redis.call('HMGET', KEYS[1], 'status', 'attempt', 'owner')
if record[1] ~= 'running' or record[2] ~= ARGV[1] or record[3] ~= ARGV[2] then return 0 end
local time = redis.call('TIME')
redis.call('HSET', KEYS[1], 'beat', time[1] * 1000 + math.floor(time[2] / 1000))
return 1
