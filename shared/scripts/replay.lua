-- Opens a failed generation again, under the same message id, for a dead letter. Its next attempt is above every id
-- that a client may have seen; what it had said is kept out: the old log (or its compacted text) goes.
-- KEYS: 1 record, 2 log, 3 the user's open generations
-- ARGV: 1 message id, 2 node, 3 payload (JSON), 4 conversation id or '', 5 life of an open record in ms,
--       6 the last attempt, as the dead letter has it
-- Returns {'reopened', node} | {'open', node} it is queued or running | {'ended', status} it has an answer
local record = redis.call('HMGET', KEYS[1], 'status', 'attempt', 'node')
local status = record[1]
if status == 'queued' or status == 'running' then return { 'open', record[3] or '' } end
if status and status ~= 'failed' then return { 'ended', status } end
local attempt = math.max(tonumber(ARGV[6]), tonumber(record[2] or '0'))
local top = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)
if top[1] then attempt = math.max(attempt, tonumber(string.match(top[1][1], '^%d+'))) end
redis.call('DEL', KEYS[1], KEYS[2])
redis.call('HSET', KEYS[1], 'status', 'queued', 'attempt', attempt, 'tries', 0, 'node', ARGV[2], 'routes', '',
  'payload', ARGV[3])
redis.call('PEXPIRE', KEYS[1], ARGV[5])
redis.call('HSET', KEYS[3], ARGV[1], ARGV[4])
redis.call('PEXPIRE', KEYS[3], ARGV[5])
return { 'reopened', ARGV[2] }
