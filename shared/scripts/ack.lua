-- Acknowledges and deletes a request, only for the worker that holds it.
-- KEYS: 1 requests   ARGV: 1 group, 2 worker, 3 entry   Returns 1, or 0 when it is not ours
local pending = redis.pcall('XPENDING', KEYS[1], ARGV[1], ARGV[3], ARGV[3], 1, ARGV[2]) -- no group: none
if #pending == 0 then return 0 end
redis.call('XACK', KEYS[1], ARGV[1], ARGV[3])
redis.call('XDEL', KEYS[1], ARGV[3])
return 1
