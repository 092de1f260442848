-- A takeover that ends the generation at once. Its frame keeps the text of the attempt that it stops, and so does the
-- record, as in finish.lua.
-- KEYS: 1 record, 2 log, 3 the user's open generations
-- ARGV: 1 message id, 2 retention in ms, 3 how long the log stays in ms, 4 most bytes of text that the record takes
-- Returns {'unknown'} | {'ended', status} it had ended before
--       | {'cancelled', id, id before or '', length in UTF-16 units, routes, home node}
local record = redis.call('HMGET', KEYS[1], 'status', 'attempt', 'routes', 'node')
local status = record[1]
if not status then return { 'unknown' } end
if status ~= 'queued' and status ~= 'running' then return { 'ended', status } end
local attempt, length, before = tonumber(record[2]), 0, ''
local texts, bytes, last = {}, 0, ''
local top = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)
if top[1] then
  before = top[1][1]
  local logged = tonumber(string.match(before, '^%d+'))
  if logged > attempt then attempt = logged end
  local from = attempt .. '-0'
  repeat
    local page = redis.call('XRANGE', KEYS[2], from, '+', 'COUNT', 500)
    for _, entry in ipairs(page) do
      if entry[2][1] == 'token' then
        -- UTF-16 units of UTF-8 text: one a character, one more for each character of four bytes.
        local _, characters = string.gsub(entry[2][2], '[^\128-\191]', '')
        local _, wide = string.gsub(entry[2][2], '[\240-\247]', '')
        length = length + characters + wide
        bytes = bytes + #entry[2][2]
        if bytes <= tonumber(ARGV[4]) then texts[#texts + 1] = entry[2][2] end
        last = entry[1]
      end
      from = '(' .. entry[1]
    end
  until #page < 500
end
local id = (attempt + 1) .. '-0'
local terminal = cjson.encode({ finishReason = 'cancelled', length = length })
redis.call('XADD', KEYS[2], id, 'done', terminal)
redis.call('HSET', KEYS[1], 'status', 'cancelled', 'attempt', attempt)
local fits = bytes <= tonumber(ARGV[4])
if fits then
  redis.call('HSET', KEYS[1], 'text', table.concat(texts), 'last', last, 'terminal', id .. ' done ' .. terminal)
end
redis.call('HDEL', KEYS[1], 'payload', 'beat', 'entry', 'tries', 'trace', 'owner')
redis.call('PEXPIRE', KEYS[1], ARGV[2])
redis.call('PEXPIRE', KEYS[2], fits and ARGV[3] or ARGV[2])
redis.call('HDEL', KEYS[3], ARGV[1])
return { 'cancelled', id, before, length, record[3] or '', record[4] or '' }
