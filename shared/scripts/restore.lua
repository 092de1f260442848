-- Puts back what a failover or a deleted key took of a running attempt: frames of its log, or the record too.
-- KEYS: 1 record, 2 log, 3 the user's open generations
-- ARGV: 1 attempt, 2 owner, 3 request entry, 4 life of an open record in ms, 5 message id, 6 node, 7 tries, 8 conversation
--       id or '', 9 payload, or '' when a record that is gone must not be made again, then (seq, text) pairs from seq 1 on
-- Returns {'restored', routes} | {'fenced'} | {'missing'} the record itself is gone
local record = redis.call('HMGET', KEYS[1], 'status', 'attempt', 'owner', 'routes')
local ours = tonumber(ARGV[1])
local top = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)
local topAttempt, topSeq = 0, -1
if top[1] then
  local a, s = string.match(top[1][1], '^(%d+)-(%d+)$')
  topAttempt, topSeq = tonumber(a), tonumber(s)
end
if record[1] then
  if record[1] ~= 'queued' and record[1] ~= 'running' then return { 'fenced' } end
  local attempt = tonumber(record[2])
  if attempt > ours or (attempt == ours and record[3] ~= ARGV[2]) then return { 'fenced' } end
  if attempt == ours and record[1] ~= 'running' then return { 'fenced' } end
elseif ARGV[9] == '' or (top[1] and top[1][2][1] ~= 'start' and top[1][2][1] ~= 'token') then
  return { 'missing' }
end
if topAttempt > ours then return { 'fenced' } end
if not record[1] then
  record[4] = ARGV[6]
  redis.call('HSET', KEYS[1], 'tries', ARGV[7], 'node', ARGV[6], 'routes', ARGV[6], 'payload', ARGV[9])
  redis.call('HSET', KEYS[3], ARGV[5], ARGV[8])
  redis.call('PEXPIRE', KEYS[3], ARGV[4])
end
if topAttempt < ours then topSeq = -1 end
-- A failover can lose frames and still take the next one: a log with a hole is written anew, with the same ids.
-- Older attempts go with it; who asks for a place in them is told so and starts from this attempt.
if topSeq > 0 and #redis.call('XRANGE', KEYS[2], ours .. '-0', '+') <= topSeq then
  redis.call('DEL', KEYS[2])
  topSeq = -1
end
local time = redis.call('TIME')
redis.call('HSET', KEYS[1], 'status', 'running', 'attempt', ours, 'owner', ARGV[2], 'entry', ARGV[3],
  'beat', time[1] * 1000 + math.floor(time[2] / 1000))
if topSeq < 0 then redis.call('XADD', KEYS[2], ours .. '-0', 'start', ours) end
for i = 10, #ARGV, 2 do
  if tonumber(ARGV[i]) > topSeq then redis.call('XADD', KEYS[2], ours .. '-' .. ARGV[i], 'token', ARGV[i + 1]) end
end
redis.call('PEXPIRE', KEYS[1], ARGV[4])
redis.call('PEXPIRE', KEYS[2], ARGV[4])
return { 'restored', record[4] or '' }
