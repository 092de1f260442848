-- Writes the start of a first attempt into its log, and the first text if there is any. `begin` leaves that to the
-- worker: an answer that is there at once never needs a log (see finish.lua). Safe to repeat.
-- KEYS: 1 record, 2 log   ARGV: 1 attempt, 2 worker, 3 life of an open record in ms, 4 first text or nothing
-- Returns the routes, or nil when the attempt is not theirs any more
local record = redis.call('HMGET', KEYS[1], 'status', 'attempt', 'owner', 'routes')
if record[1] ~= 'running' or record[2] ~= ARGV[1] or record[3] ~= ARGV[2] then return false end
if redis.call('EXISTS', KEYS[2]) == 0 then
  redis.call('XADD', KEYS[2], ARGV[1] .. '-0', 'start', ARGV[1])
  if ARGV[4] then redis.call('XADD', KEYS[2], ARGV[1] .. '-1', 'token', ARGV[4]) end
  redis.call('PEXPIRE', KEYS[2], ARGV[3])
end
return record[4] or ''
