-- Moves a request that we hold to the retry set, in one step.
-- KEYS: 1 requests, 2 retries   ARGV: 1 group, 2 worker, 3 entry, 4 user, 5 message id, 6 delay in ms
-- Returns 1, or 0 when it is not ours. One that is in no stream (deleted under us) is kept: we hold its record.
local pending = redis.pcall('XPENDING', KEYS[1], ARGV[1], ARGV[3], ARGV[3], 1, ARGV[2])
if #pending == 0 and #redis.call('XRANGE', KEYS[1], ARGV[3], ARGV[3]) > 0 then return 0 end
local time = redis.call('TIME')
redis.call('ZADD', KEYS[2], time[1] * 1000 + math.floor(time[2] / 1000) + tonumber(ARGV[6]), ARGV[4] .. ' ' .. ARGV[5])
redis.pcall('XACK', KEYS[1], ARGV[1], ARGV[3])
redis.call('XDEL', KEYS[1], ARGV[3])
return 1
