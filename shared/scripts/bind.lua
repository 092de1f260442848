-- @include read_inbox
-- Binds a connection to a user: the door, the presence entry and the first page of the inbox in one step, so
-- that every message is either in the page or is sent to this connection.
-- KEYS: 1 access, 2 connections, 3 cursors, 4 inbox
-- ARGV: 1 connection, 2 its entry (JSON), 3 device, 4 ' node/instance node/instance ' of the live gateways or ''
--       when not known, 5 most connections (-1 the newest only), 6 life of the entries in ms,
--       7 inbox id to start after or '' for the device's cursor, 8 most messages in a page,
--       9 how long an entry counts as live whatever ARGV 4 says, in ms, 10 '1' when a named device replaces itself,
--       11 how long messages are kept, in ms
-- Returns {'banned', reason} | {'locked', until in ms} | {'full', connections}
--       | {'bound', start, dropped up to or '', page, replaced connections as {connection, entry, ...}}
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local access = redis.call('HMGET', KEYS[1], 'banned', 'lockedUntil')
if access[1] then return { 'banned', access[1] } end
if access[2] and tonumber(access[2]) > now then return { 'locked', access[2] } end

local most, replaced, count = tonumber(ARGV[5]), {}, 0
local entries = redis.call('HGETALL', KEYS[2])
for i = 1, #entries, 2 do
  local entry = cjson.decode(entries[i + 1])
  if entries[i] == ARGV[1] then -- this very call, repeated
  elseif ARGV[4] ~= '' and now - entry.since > tonumber(ARGV[9])
    and not string.find(ARGV[4], ' ' .. entry.node .. '/' .. entry.instance .. ' ', 1, true) then
    redis.call('HDEL', KEYS[2], entries[i]) -- its gateway is gone
  elseif most == -1 or (ARGV[10] == '1' and entry.device == ARGV[3] and ARGV[3] ~= 'default') then
    replaced[#replaced + 1] = entries[i]
    replaced[#replaced + 1] = entries[i + 1]
  else
    count = count + 1
  end
end
if most > 0 and count >= most then return { 'full', count } end
for i = 1, #replaced, 2 do redis.call('HDEL', KEYS[2], replaced[i]) end
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
redis.call('PEXPIRE', KEYS[2], ARGV[6])

local start = ARGV[7] ~= '' and ARGV[7] or redis.call('HGET', KEYS[3], 'd:' .. ARGV[3]) or ''
local read = read_inbox({ KEYS[4], KEYS[3] }, { start, ARGV[8], ARGV[11] })
return { 'bound', read[1], read[2], read[3], replaced }
