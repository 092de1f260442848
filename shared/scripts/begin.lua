-- Opens the next attempt: from here on Redis refuses every append of an older one. Where there is no older one, the
-- start is not written yet: see open_log.lua.
-- KEYS: 1 record, 2 log
-- ARGV: 1 request (node and entry), 2 worker, 3 most tries, 4 lease in ms, 5 life of an open record in ms
-- Returns {'missing'} nothing is known of it (expired, or lost with the server's memory)
--       | {'terminal'} it has ended: acknowledge and leave
--       | {'duplicate'} another entry of the same request is being worked on by a live worker
--       | {'exhausted', …} every try is used up; the attempt is opened so that it can be failed
--       | {'run', attempt, tries, payload, routes, id before, admitted ms, whether the log has its start 0|1}
local record = redis.call('HMGET', KEYS[1], 'status', 'attempt', 'tries', 'payload', 'routes', 'entry', 'beat', 'admitted')
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
local opened = 0
if attempt > 1 then
  opened = 1
  redis.call('PEXPIRE', KEYS[1], ARGV[5]) -- admit.lua set it before
  redis.call('XADD', KEYS[2], attempt .. '-0', 'start', attempt)
  redis.call('PEXPIRE', KEYS[2], ARGV[5])
end
return { tries > tonumber(ARGV[3]) and 'exhausted' or 'run', attempt, tries, record[4] or '', record[5] or '', before,
  record[8] or '0', opened }
