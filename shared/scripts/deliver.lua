-- Puts a message into an inbox once, and says where its reader is connected, in one step with both.
-- KEYS: 1 inbox, 2 fingerprints, 3 older fingerprints, 4 cursors, 5 connections
-- ARGV: 1 fingerprint of sender and message id, 2 the frame without its id, 3 most messages kept, 4 how long in ms,
--       5 most fingerprints, 6 how long a fingerprint is remembered at least, in ms
-- Returns {id, id before, {connection as JSON, ...}}; the id before is '-' when there is none, and '?' when the
-- message had been delivered before under this id
local known = redis.call('HGET', KEYS[2], ARGV[1]) or redis.call('HGET', KEYS[3], ARGV[1])
if known then return { known, '?', redis.call('HVALS', KEYS[5]) } end

local top = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)
local id = redis.call('XADD', KEYS[1], '*', 'm', ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[4])

local dropped = not top[1] and redis.call('HGET', KEYS[4], 'top') -- an inbox that was there has expired whole
local oldest = string.format('%.0f', math.max(0, string.match(id, '^%d+') - ARGV[4]))
local aged = redis.call('XREVRANGE', KEYS[1], '(' .. oldest .. '-0', '-', 'COUNT', 1)
if aged[1] then
  dropped = aged[1][1]
  redis.call('XTRIM', KEYS[1], 'MINID', oldest .. '-0')
end
local length = redis.call('XLEN', KEYS[1])
if length > tonumber(ARGV[3]) then
  local many = math.min(100, length - ARGV[3]) -- one, but after the bound was lowered
  local first = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', many)
  dropped = first[many][1]
  redis.call('XTRIM', KEYS[1], 'MAXLEN', length - many)
end
-- Cursors outlive the inbox, or what they are beyond would come again. Renewed seldom: PTTL is neither stored nor replicated.
redis.call('HSET', KEYS[4], 'top', id)
if dropped then redis.call('HSET', KEYS[4], 'dropped', dropped) end
if redis.call('PTTL', KEYS[4]) < 1.5 * ARGV[4] then redis.call('PEXPIRE', KEYS[4], 2 * ARGV[4]) end

local remembered = redis.call('HLEN', KEYS[2])
if remembered > 0 and (remembered >= tonumber(ARGV[5]) or redis.call('PTTL', KEYS[2]) < tonumber(ARGV[6])) then
  redis.call('RENAME', KEYS[2], KEYS[3])
  redis.call('PEXPIRE', KEYS[3], ARGV[6])
  remembered = 0
end
redis.call('HSET', KEYS[2], ARGV[1], id)
if remembered == 0 then redis.call('PEXPIRE', KEYS[2], 2 * ARGV[6]) end
return { id, top[1] and top[1][1] or '-', redis.call('HVALS', KEYS[5]) }
