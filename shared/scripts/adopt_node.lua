-- Lists a gateway that the registry has lost, as one whose lease has ended: what is queued for it is worked on, and then it is
-- forgotten.
-- KEYS: 1 nodes   ARGV: 1 node, 2 entry (JSON)   Returns 1 when it was missing
if redis.call('HGET', KEYS[1], ARGV[1]) then return 0 end
return redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
