-- Ends a generation: the last text, the terminal frame, the record, the expiry. The record gets the whole text, and the
-- log goes by itself a while later: a stream costs 4.7 KB at the least on Redis 7.0, a field a few bytes. An answer that
-- was there at once has never begun (see open_first.lua): it begins and ends here, and has no log at all.
-- KEYS: 1 record, 2 log, 3 the user's open generations, 4 the user's quota
-- ARGV: 1 attempt, 2 owner, 3 message id, 4 status, 5 id of the last text or '', 6 that text, or '' when the log has it,
--       7 terminal id, 8 terminal type, 9 terminal frame without ids (JSON), 10 retention in ms,
--       11 '1' when it has not begun, 12 how long the log stays in ms, 13 '1' when the record takes the text (else it is too
--       long, and stays a log), 14 the text before the last
-- Returns {'ended', routes} (also when it was ended by this very call before) | {'fenced'}
--       | {'stale'} it has not begun, and this is not a first attempt: it is for begin.lua to say what it is
--       | {'behind'} the log lacks frames before these: append them first
local record = redis.call('HMGET', KEYS[1], 'status', 'attempt', 'owner', 'routes', 'quota')
local whole, ours = ARGV[11] == '1', nil
if whole then ours = record[1] == 'queued' and record[2] == '0' and redis.call('EXISTS', KEYS[2]) == 0
else ours = record[1] == 'running' and record[2] == ARGV[1] and record[3] == ARGV[2] end
if not ours then
  local other = whole and 'stale' or 'fenced'
  if record[1] ~= ARGV[4] or record[2] ~= ARGV[1] or record[3] ~= ARGV[2] then return { other } end
  local top = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', '1')
  local terminal = redis.call('HGET', KEYS[1], 'terminal') or ''
  local same = top[1] and top[1][1] == ARGV[7] or string.sub(terminal, 1, #ARGV[7] + 1) == ARGV[7] .. ' '
  return same and { 'ended', record[4] or '' } or { other }
end
if not whole then
  local first = ARGV[6] ~= '' and ARGV[5] or ARGV[7]
  local top = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', '1')
  local seq = tonumber(string.match(first, '%d+$'))
  if not top[1] or top[1][1] ~= ARGV[1] .. '-' .. (seq - 1) then return { 'behind' } end
  if ARGV[6] ~= '' then redis.call('XADD', KEYS[2], ARGV[5], 'token', ARGV[6]) end
  redis.call('XADD', KEYS[2], ARGV[7], ARGV[8], ARGV[9])
  redis.call('PEXPIRE', KEYS[2], ARGV[13] == '1' and ARGV[12] or ARGV[10])
end
if ARGV[13] == '1' then
  local text, terminal = ARGV[14] .. ARGV[6], ARGV[7] .. ' ' .. ARGV[8] .. ' ' .. ARGV[9]
  if whole then
    redis.call('HSET', KEYS[1], 'status', ARGV[4], 'text', text, 'last', ARGV[5], 'terminal', terminal, 'whole', '1',
      'attempt', ARGV[1], 'owner', ARGV[2])
  else
    redis.call('HSET', KEYS[1], 'status', ARGV[4], 'text', text, 'last', ARGV[5], 'terminal', terminal)
  end
  redis.call('HDEL', KEYS[1], 'payload', 'beat', 'entry', 'tries', 'trace', 'node')
else
  redis.call('HSET', KEYS[1], 'status', ARGV[4])
  redis.call('HDEL', KEYS[1], 'payload', 'beat', 'entry', 'tries', 'trace')
end
redis.call('PEXPIRE', KEYS[1], ARGV[10])
redis.call('HDEL', KEYS[3], ARGV[3])
if record[5] and ARGV[4] == 'failed' and redis.call('HGET', KEYS[4], 'day') == record[5] then
  redis.call('HINCRBY', KEYS[4], 'used', -1) -- what failed does not count
end
return { 'ended', record[4] or '' }
