-- Ends a generation: the last text, the terminal frame, the record, the expiry. An answer that never had a log goes
-- into its record at once, as compact.lua would leave it.
-- KEYS: 1 record, 2 log, 3 the user's open generations, 4 the user's quota
-- ARGV: 1 attempt, 2 worker, 3 message id, 4 status, 5 id of the last text or '', 6 last text,
--       7 terminal id, 8 terminal type, 9 terminal frame without ids (JSON), 10 retention in ms,
--       11 '1' when its log was never opened, 12 how long such an answer does not count as compacted, in ms
-- Returns {'ended', routes, whole 0|1} (also when it was ended by this very call before) | {'fenced'}
--       | {'behind', top id} the log lacks frames before these: append them first
local record = redis.call('HMGET', KEYS[1], 'status', 'attempt', 'owner', 'routes', 'quota')
local top = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)
top = top[1] and top[1][1] or ''
if record[1] ~= 'running' or record[2] ~= ARGV[1] or record[3] ~= ARGV[2] then
  if record[1] ~= ARGV[4] or record[2] ~= ARGV[1] then return { 'fenced' } end
  if top == ARGV[7] and record[3] == ARGV[2] then return { 'ended', record[4] or '', 0 } end
  local terminal = redis.call('HGET', KEYS[1], 'terminal') or ''
  if string.sub(terminal, 1, #ARGV[7] + 1) == ARGV[7] .. ' ' then return { 'ended', record[4] or '', 1 } end
  return { 'fenced' }
end
local first = ARGV[5] ~= '' and ARGV[5] or ARGV[7]
local whole = 0
if ARGV[11] == '1' and top == '' then
  whole = 1
  local time = redis.call('TIME')
  redis.call('HSET', KEYS[1], 'status', ARGV[4], 'text', ARGV[6], 'last', ARGV[5],
    'terminal', ARGV[7] .. ' ' .. ARGV[8] .. ' ' .. ARGV[9], 'fresh', time[1] * 1000 + tonumber(ARGV[12]))
  redis.call('HDEL', KEYS[1], 'payload', 'beat', 'entry', 'tries', 'node', 'admitted', 'owner')
else
  local seq = tonumber(string.match(first, '%d+$'))
  if top ~= ARGV[1] .. '-' .. (seq - 1) then return { 'behind', top } end
  if ARGV[5] ~= '' then redis.call('XADD', KEYS[2], ARGV[5], 'token', ARGV[6]) end
  redis.call('XADD', KEYS[2], ARGV[7], ARGV[8], ARGV[9])
  redis.call('HSET', KEYS[1], 'status', ARGV[4])
  redis.call('HDEL', KEYS[1], 'payload', 'beat', 'entry', 'tries')
  redis.call('PEXPIRE', KEYS[2], ARGV[10])
end
redis.call('PEXPIRE', KEYS[1], ARGV[10])
redis.call('HDEL', KEYS[3], ARGV[3])
if record[5] and ARGV[4] == 'failed' and redis.call('HGET', KEYS[4], 'day') == record[5] then
  redis.call('HINCRBY', KEYS[4], 'used', -1) -- what failed does not count
end
return { 'ended', record[4] or '', whole }
