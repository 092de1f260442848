-- Puts back what a failover or a deleted key took of a running attempt: frames of its log, or the record too.
-- A record is made again only while it cannot have ended: it was open when its request was appended, and one that ends is
-- kept for the retention.
-- KEYS: 1 record, 2 log, 3 the user's open generations
-- ARGV: 1 attempt, 2 owner, 3 request (node and entry), 4 life of an open record in ms, 5 retention in ms, 6 payload, or ''
--       to leave a record alone that is gone, 7 message id, 8 node, 9 routes, 10 tries, 11 conversation id or '', 12 trace
--       context or '', then (seq, text) pairs from seq 1 on
-- Returns {'restored', routes, 1 when the record was made again, else 0} | {'fenced'}
--       | {'missing'} the record is gone, and was left alone or may have ended
local record = redis.call('HMGET', KEYS[1], 'status', 'attempt', 'owner', 'routes')
local ours = tonumber(ARGV[1])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
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
else
  local requestedMs = tonumber(string.match(ARGV[3], '(%d+)%-%d+$'))
  local hasEnded = top[1] and top[1][2][1] ~= 'start' and top[1][2][1] ~= 'token'
  if ARGV[6] == '' or hasEnded or now - requestedMs >= tonumber(ARGV[5]) then return { 'missing' } end
end
if topAttempt > ours then return { 'fenced' } end
local isGone = not record[1]
if isGone then
  record[4] = ARGV[9]
  redis.call('HSET', KEYS[1], 'tries', ARGV[10], 'node', ARGV[8], 'routes', ARGV[9], 'payload', ARGV[6])
  if ARGV[12] ~= '' then redis.call('HSET', KEYS[1], 'trace', ARGV[12]) end
  redis.call('HSET', KEYS[3], ARGV[7], ARGV[11])
  redis.call('PEXPIRE', KEYS[3], ARGV[4])
end
-- A failover can lose frames and still take the next one: a log with a hole is written anew, with the same ids, and so is
-- one without its record, because nobody can say whose frames it has. Older attempts go with it; who asks for a place in
-- them is told so and starts from this attempt.
if topAttempt < ours then topSeq = -1
elseif isGone or #redis.call('XRANGE', KEYS[2], ours .. '-0', '+') <= topSeq then
  redis.call('DEL', KEYS[2])
  topSeq = -1
end
redis.call('HSET', KEYS[1], 'status', 'running', 'attempt', ours, 'owner', ARGV[2], 'entry', ARGV[3], 'beat', now)
if topSeq < 0 then redis.call('XADD', KEYS[2], ours .. '-0', 'start', ours) end
for i = 13, #ARGV, 2 do
  if tonumber(ARGV[i]) > topSeq then redis.call('XADD', KEYS[2], ours .. '-' .. ARGV[i], 'token', ARGV[i + 1]) end
end
redis.call('PEXPIRE', KEYS[1], ARGV[4])
redis.call('PEXPIRE', KEYS[2], ARGV[4])
return { 'restored', record[4] or '', isGone and 1 or 0 }
