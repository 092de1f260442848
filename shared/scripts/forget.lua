-- Takes back a record whose request could not be queued. Only while nothing has begun.
-- KEYS: 1 record, 2 the user's open generations, 3 the user's quota   ARGV: 1 message id   Returns 1 when it was removed
local record = redis.call('HMGET', KEYS[1], 'status', 'attempt', 'quota')
if record[1] ~= 'queued' or record[2] ~= '0' then return 0 end
if record[3] and redis.call('HGET', KEYS[3], 'day') == record[3] then redis.call('HINCRBY', KEYS[3], 'used', -1) end
redis.call('DEL', KEYS[1])
redis.call('HDEL', KEYS[2], ARGV[1])
return 1
