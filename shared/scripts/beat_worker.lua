-- Renews the lease of a worker's entry, by the clock that leases are read with.
-- KEYS: 1 workers   ARGV: 1 worker, 2 lease in ms, 3 its facts (JSON object, not empty)
local time = redis.call('TIME')
local untilMs = time[1] * 1000 + math.floor(time[2] / 1000) + tonumber(ARGV[2])
redis.call('HSET', KEYS[1], ARGV[1], string.format('{"until":%d,', untilMs) .. string.sub(ARGV[3], 2))
