-- Gives a running attempt up, so that another may be opened later. Safe to repeat.
-- KEYS: 1 record   ARGV: 1 attempt, 2 owner, 3 whether the try counts 0|1   Returns 1, or 0 when fenced
local record = redis.call('HMGET', KEYS[1], 'status', 'attempt', 'owner')
if record[2] ~= ARGV[1] or record[3] ~= ARGV[2] then return 0 end
if record[1] == 'queued' then return 1 end -- by this very call before
if record[1] ~= 'running' then return 0 end
redis.call('HSET', KEYS[1], 'status', 'queued', 'beat', 0)
if ARGV[3] == '0' then redis.call('HINCRBY', KEYS[1], 'tries', -1) end
return 1
