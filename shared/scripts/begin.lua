-- Opens the next attempt: from here on Redis refuses every append of an older one. The first attempt of a request that
-- came with its payload takes a shorter way: see open_first.lua.
-- KEYS: 1 record, 2 log
-- ARGV: 1 request (node and entry), 2 worker, 3 most tries, 4 lease in ms, 5 life of an open record in ms
-- Returns {'missing'} nothing is known of it (expired, or lost with the server's memory)
--       | {'terminal'} it has ended: acknowledge and leave
--       | {'duplicate'} another entry of the same request is being worked on by a live worker
--       | {'exhausted', …} every try is used up; the attempt is opened so that it can be failed
--       | {'run', attempt, tries, payload, routes, id before, trace context or ''}
local record = redis.call('HMGET', KEYS[1], 'status', 'attempt', 'tries', 'payload', 'routes', 'entry', 'beat', 'trace')
local status = record[1]
if not status then return { 'missing' } end
if status ~= 'queued' and status ~= 'running' then return { 'terminal' } end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
if status == 'running' and record[6] ~= ARGV[1] and now - (tonumber(record[7]) or 0) < tonumber(ARGV[4]) then
  return { 'duplicate' }
end
local top = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)
local before, attempt = '', tonumber(record[2]) + 1
if top[1] then
  before = top[1][1]
  -- A failover may have lost the record's count but not the log, or the other way round: go above both.
  local logged = tonumber(string.match(before, '^%d+'))
  if logged >= attempt then attempt = logged + 1 end
end
local tries = tonumber(record[3]) + 1
redis.call('HSET', KEYS[1], 'status', 'running', 'attempt', attempt, 'tries', tries, 'owner', ARGV[2],
  'entry', ARGV[1], 'beat', now)
redis.call('PEXPIRE', KEYS[1], ARGV[5])
redis.call('XADD', KEYS[2], attempt .. '-0', 'start', attempt)
redis.call('PEXPIRE', KEYS[2], ARGV[5])
return { tries > tonumber(ARGV[3]) and 'exhausted' or 'run', attempt, tries, record[4] or '', record[5] or '', before,
  record[8] or '' }
