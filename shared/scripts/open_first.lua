-- Opens the first attempt of a request that came with its payload, and writes the start and the first text, if there is
-- any, into its log. Its worker has begun without asking; here it learns whether it may go on.
-- Where one server holds both, the same step publishes these frames to the node that wants them: a client sees its first
-- token a round trip sooner.
-- Not safe to repeat: a worker that lost the answer compares what it has with restore.lua.
-- KEYS: 1 record, 2 log, 3 the reply stream of that node, or nothing
-- ARGV: 1 request (node and entry), 2 owner, 3 life of an open record in ms, 4 '1' when 5 is the first text, 5 that or '',
--       then with a reply stream: 6 the routes as the worker guesses them, then the rest of the XADD
-- Returns {routes, whether they were published 0|1}, or nil, with nothing changed, when this is not a first attempt:
--       it is for begin.lua to say what it is
local record = redis.call('HMGET', KEYS[1], 'status', 'attempt', 'routes')
if record[1] ~= 'queued' or record[2] ~= '0' then return false end
local opened = redis.pcall('XADD', KEYS[2], '1-0', 'start', '1')
if type(opened) ~= 'string' then
  if redis.call('EXISTS', KEYS[2]) == 1 then return false end
  return opened -- the error
end
local time = redis.call('TIME')
redis.call('HSET', KEYS[1], 'status', 'running', 'attempt', '1', 'tries', '1', 'owner', ARGV[2], 'entry', ARGV[1],
  'beat', string.format('%d', time[1] * 1000 + math.floor(time[2] / 1000)))
if ARGV[4] == '1' then redis.call('XADD', KEYS[2], '1-1', 'token', ARGV[5]) end
redis.call('PEXPIRE', KEYS[2], ARGV[3])
local routes, published = record[3] or '', 0
if KEYS[3] and routes == ARGV[6] then
  redis.call('XADD', KEYS[3], unpack(ARGV, 7))
  published = 1
end
return { routes, published }
