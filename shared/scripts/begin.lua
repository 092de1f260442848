-- Opens the next attempt: from here on Redis refuses every append of an older one. The first attempt of a request that
-- came with its payload takes a shorter way: see open_first.lua.
-- KEYS: 1 record, 2 log
-- ARGV: 1 request (node and entry), 2 owner, 3 most tries, 4 lease in ms, 5 life of an open record in ms,
--       6 '1' to go above an attempt that somebody else is working on
-- Safe to repeat, also late: an owner has one attempt.
-- Returns {'missing'} nothing is known of it (expired, or lost with the server's memory)
--       | {'terminal'} it has ended: acknowledge and leave
--       | {'duplicate', ms} another entry of the same request is being worked on: ask again when its lease is over
--       | {'exhausted', …} every try is used up; the attempt is opened so that it can be failed
--       | {'run', attempt, tries, payload, routes, id before, trace context or ''}
local record = redis.call('HMGET', KEYS[1], 'status', 'attempt', 'tries', 'payload', 'routes', 'entry', 'beat', 'trace',
  'owner')
local status = record[1]
if not status then return { 'missing' } end
if status ~= 'queued' and status ~= 'running' then return { 'terminal' } end
if record[9] == ARGV[2] then -- by this very call before
  if status == 'queued' then return { 'terminal' } end -- and given up since: it comes late, and nobody waits for it
  local start = redis.call('XREVRANGE', KEYS[2], record[2] .. '-0', '-', 'COUNT', 2)
  return { tonumber(record[3]) > tonumber(ARGV[3]) and 'exhausted' or 'run', tonumber(record[2]), tonumber(record[3]),
    record[4] or '', record[5] or '', start[2] and start[2][1] or '', record[8] or '' }
end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local leaseMs = tonumber(ARGV[4]) - (now - (tonumber(record[7]) or 0))
if status == 'running' and record[6] ~= ARGV[1] and leaseMs > 0 and ARGV[6] ~= '1' then
  return { 'duplicate', leaseMs }
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
