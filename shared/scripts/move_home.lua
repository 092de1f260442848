-- Says which node's request stream carries an open generation from now on.
-- KEYS: 1 record   ARGV: 1 node   Returns 1, or 0 when it is not open (any more)
local status = redis.call('HGET', KEYS[1], 'status')
if status ~= 'queued' and status ~= 'running' then return 0 end
redis.call('HSET', KEYS[1], 'node', ARGV[1])
return 1
