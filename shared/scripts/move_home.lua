-- Says which node's request stream carries an open generation from now on.
-- KEYS: 1 record   ARGV: 1 node
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
redis.call('HSET', KEYS[1], 'node', ARGV[1])
return 1
