-- Makes the record of a generation, or joins the one that is there.
-- KEYS: 1 record, 2 the user's open generations, 3 the user's quota, 4 access
-- ARGV: 1 message id, 2 node, 3 payload (JSON), 4 conversation id or '', 5 most open generations,
--       6 life of an open record in ms, 7 prefix of this user's record keys, 8 most a day (0 = any number), where the
--       user has no number of their own, 9 trace context or ''
-- Returns {'created'} | {'joined', status, node} | {'too_many_active'} | {'conversation_busy'}
--       | {'quota_exhausted', ms until it begins anew}
local record = redis.call('HMGET', KEYS[1], 'status', 'node')
if record[1] then
  return { 'joined', record[1], record[2] or '' }
end
local open = redis.call('HGETALL', KEYS[2])
local count = 0
for i = 1, #open, 2 do
  if redis.call('EXISTS', ARGV[7] .. open[i]) == 1 then
    if ARGV[4] ~= '' and open[i + 1] == ARGV[4] then return { 'conversation_busy' } end
    count = count + 1
  else
    redis.call('HDEL', KEYS[2], open[i]) -- its record expired or was lost: it holds no place
  end
end
if count >= tonumber(ARGV[5]) then return { 'too_many_active' } end
local most = tonumber(redis.call('HGET', KEYS[4], 'quota') or (ARGV[8] == '0' and '-1' or ARGV[8]))
if most >= 0 then
  local time = redis.call('TIME')
  local now = time[1] * 1000 + math.floor(time[2] / 1000)
  local day = math.floor(now / 86400000)
  local quota = redis.call('HMGET', KEYS[3], 'day', 'used')
  local used = quota[1] == tostring(day) and tonumber(quota[2]) or 0
  if used >= most then return { 'quota_exhausted', (day + 1) * 86400000 - now } end
  redis.call('HSET', KEYS[3], 'day', day, 'used', used + 1)
  redis.call('PEXPIRE', KEYS[3], '172800000')
  redis.call('HSET', KEYS[1], 'quota', day) -- counted: `finish` gives it back if this fails
end
redis.call('HSET', KEYS[1], 'status', 'queued', 'attempt', '0', 'tries', '0', 'node', ARGV[2], 'routes', ARGV[2],
  'payload', ARGV[3])
if ARGV[9] ~= '' then redis.call('HSET', KEYS[1], 'trace', ARGV[9]) end -- for the attempts after the first
redis.call('PEXPIRE', KEYS[1], ARGV[6])
redis.call('HSET', KEYS[2], ARGV[1], ARGV[4])
redis.call('PEXPIRE', KEYS[2], ARGV[6])
return { 'created' }
