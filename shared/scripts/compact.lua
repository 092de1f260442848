-- Moves a finished log into its record: text, id of the last token, terminal frame. A stream costs 4.7 KB at
-- the least on Redis 7.0, a field a few bytes. A long text stays a log: it gains little, and a client that reads
-- slowly should not get it in one piece.
-- KEYS: 1 record, 2 log
-- ARGV: 1 most bytes of text, and where the caller has it: 2 terminal frame, 3 id of the last token or '', 4 text
-- Returns 1 when it was compacted
local record = redis.call('HMGET', KEYS[1], 'status', 'attempt', 'text')
if not record[1] or record[1] == 'queued' or record[1] == 'running' or record[3] then return 0 end
local texts, bytes, last, terminal = {}, 0, '', nil
if ARGV[2] then
  local top = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)
  if not top[1] or top[1][1] ~= string.match(ARGV[2], '^%S+') or #ARGV[4] > tonumber(ARGV[1]) then return 0 end
  texts[1], last, terminal = ARGV[4], ARGV[3], ARGV[2]
else
  local from = record[2] .. '-0'
  repeat
    local page = redis.call('XRANGE', KEYS[2], from, '+', 'COUNT', 100) -- of up to 48 KB each
    for _, entry in ipairs(page) do
      local kind = entry[2][1]
      if kind == 'token' then
        texts[#texts + 1] = entry[2][2]
        bytes = bytes + #entry[2][2]
        last = entry[1]
      elseif kind ~= 'start' then
        terminal = entry[1] .. ' ' .. kind .. ' ' .. entry[2][2]
      end
      from = '(' .. entry[1]
    end
    if bytes > tonumber(ARGV[1]) then return 0 end
  until #page < 100
end
if not terminal then return 0 end
redis.call('HSET', KEYS[1], 'text', table.concat(texts), 'last', last, 'terminal', terminal)
redis.call('HDEL', KEYS[1], 'routes', 'node', 'admitted', 'owner')
redis.call('DEL', KEYS[2])
return 1
