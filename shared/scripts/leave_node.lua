-- Ends a gateway's lease; its entry stays until its requests are drained.
-- KEYS: 1 nodes   ARGV: 1 node, 2 instance   Returns 1 when it was ours
local held = redis.call('HGET', KEYS[1], ARGV[1])
if not held then return 0 end
local record = cjson.decode(held)
if record.instance ~= ARGV[2] then return 0 end
record['until'] = 0
redis.call('HSET', KEYS[1], ARGV[1], cjson.encode(record))
return 1
