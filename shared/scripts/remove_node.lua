-- Forgets a gateway whose lease ended long ago.
-- KEYS: 1 nodes   ARGV: 1 node, 2 grace in ms   Returns 1 when it was removed
local held = redis.call('HGET', KEYS[1], ARGV[1])
if not held then return 0 end
local time = redis.call('TIME')
if cjson.decode(held)['until'] + tonumber(ARGV[2]) > time[1] * 1000 + math.floor(time[2] / 1000) then return 0 end
return redis.call('HDEL', KEYS[1], ARGV[1])
