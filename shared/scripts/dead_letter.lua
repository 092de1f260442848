-- Writes a dead letter. The request stays until its record has ended: a crash between leaves two letters, not none.
-- KEYS: 1 requests, 2 dead letters
-- ARGV: 1 group, 2 worker, 3 entry, 4 user, 5 message id, 6 attempts, 7 code, 8 reason, 9 payload, 10 most kept,
--       11 life of the stream in ms, 12 the number of the last attempt
-- Returns 1, or 0 when another worker holds the request
local pending = redis.pcall('XPENDING', KEYS[1], ARGV[1], ARGV[3], ARGV[3], 1, ARGV[2])
if #pending == 0 and #redis.call('XRANGE', KEYS[1], ARGV[3], ARGV[3]) > 0 then return 0 end
redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[10], '*', 'user', ARGV[4], 'message', ARGV[5], 'attempts', ARGV[6],
  'last', ARGV[12], 'code', ARGV[7], 'reason', ARGV[8], 'payload', ARGV[9])
redis.call('PEXPIRE', KEYS[2], ARGV[11])
return 1
