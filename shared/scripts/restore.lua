-- Puts back what a failover or a deleted key took from the log of a running attempt.
-- KEYS: 1 record, 2 log
-- ARGV: 1 attempt, 2 owner, 3 request entry, 4 life of an open record in ms, then (seq, text) pairs from seq 1 on
-- Returns {'restored', routes} | {'fenced'} | {'missing'} the record itself is gone
local record = redis.call('HMGET', KEYS[1], 'status', 'attempt', 'owner', 'routes')
if not record[1] then return { 'missing' } end
local ours = tonumber(ARGV[1])
if record[1] ~= 'queued' and record[1] ~= 'running' then return { 'fenced' } end
local attempt = tonumber(record[2])
if attempt > ours or (attempt == ours and record[3] ~= ARGV[2]) then return { 'fenced' } end
if attempt == ours and record[1] ~= 'running' then return { 'fenced' } end
local top = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)
local topAttempt, topSeq = 0, -1
if top[1] then
  local a, s = string.match(top[1][1], '^(%d+)-(%d+)$')
  topAttempt, topSeq = tonumber(a), tonumber(s)
end
if topAttempt > ours then return { 'fenced' } end
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
for i = 5, #ARGV, 2 do
  if tonumber(ARGV[i]) > topSeq then redis.call('XADD', KEYS[2], ours .. '-' .. ARGV[i], 'token', ARGV[i + 1]) end
end
redis.call('PEXPIRE', KEYS[1], ARGV[4])
redis.call('PEXPIRE', KEYS[2], ARGV[4])
return { 'restored', record[4] or '' }
