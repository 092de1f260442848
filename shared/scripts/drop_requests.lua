-- Deletes the request stream of a node that is gone, if nothing is in it.
-- KEYS: 1 requests, 2 retries   Returns 1 when it was deleted
if redis.call('XLEN', KEYS[1]) > 0 or redis.call('ZCARD', KEYS[2]) > 0 then return 0 end
return redis.call('DEL', KEYS[1])
