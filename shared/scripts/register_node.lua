-- Takes or renews the lease of a gateway's id.
-- KEYS: 1 nodes   ARGV: 1 node, 2 instance, 3 lease in ms, 4 facts (JSON object) to keep with it
-- Returns {1} | {0, ms left of the lease that another instance holds}
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local held = redis.call('HGET', KEYS[1], ARGV[1])
if held then
  local record = cjson.decode(held)
  if record.instance ~= ARGV[2] and record['until'] > now then return { 0, record['until'] - now } end
end
local facts = cjson.decode(ARGV[4])
facts.instance = ARGV[2]
facts['until'] = now + tonumber(ARGV[3])
redis.call('HSET', KEYS[1], ARGV[1], cjson.encode(facts))
return { 1 }
