-- Says that an attempt is alive, while it is its worker's. A first attempt has not renewed the life of its record (see
-- open_first.lua): here is time for that.
-- KEYS: 1 record   ARGV: 1 attempt, 2 owner, 3 life of an open record in ms   Returns 1, or 0 when it is not theirs
local record = redis.call('HMGET', KEYS[1], 'status', 'attempt', 'owner')
if record[1] ~= 'running' or record[2] ~= ARGV[1] or record[3] ~= ARGV[2] then return 0 end
local time = redis.call('TIME')
redis.call('HSET', KEYS[1], 'beat', time[1] * 1000 + math.floor(time[2] / 1000))
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return 1
