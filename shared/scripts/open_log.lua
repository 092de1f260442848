-- Writes the start of a first attempt into its log, and the first text if there is any. `begin` leaves that to the
-- worker: an answer that is there at once never needs a log (see finish.lua). Safe to repeat.
-- Where one server holds both, the same step publishes these frames to the node that wants them: a client sees its first
-- token a round trip sooner.
-- KEYS: 1 record, 2 log, 3 the reply stream of that node, or nothing
-- ARGV: 1 attempt, 2 worker, 3 life of an open record in ms, 4 '1' when 5 is the first text, 5 that or '',
--       then with a reply stream: 6 the routes as the worker knows them, then the rest of the XADD
-- Returns {routes, whether they were published 0|1}, or nil when the attempt is not theirs any more
local record = redis.call('HMGET', KEYS[1], 'status', 'attempt', 'owner', 'routes')
if record[1] ~= 'running' or record[2] ~= ARGV[1] or record[3] ~= ARGV[2] then return false end
if redis.call('EXISTS', KEYS[2]) == 0 then
  redis.call('XADD', KEYS[2], ARGV[1] .. '-0', 'start', ARGV[1])
  if ARGV[4] == '1' then redis.call('XADD', KEYS[2], ARGV[1] .. '-1', 'token', ARGV[5]) end
  redis.call('PEXPIRE', KEYS[2], ARGV[3])
end
local routes, published = record[4] or '', 0
if KEYS[3] and routes == ARGV[6] then
  redis.call('XADD', KEYS[3], unpack(ARGV, 7))
  published = 1
end
return { routes, published }
