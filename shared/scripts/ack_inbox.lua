-- @include above
-- Moves a device's cursor forward, never back and never beyond what is or was there.
-- KEYS: 1 cursors, 2 inbox   ARGV: 1 device, 2 id, 3 most devices, 4 how long messages are kept, in ms
-- Returns 1 when it moved
local field = 'd:' .. ARGV[1]
local last = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)[1]
local top = last and last[1] or redis.call('HGET', KEYS[1], 'top') -- all may have become too old meanwhile
if not top then return 0 end
local id = above({}, { ARGV[2], top }) and top or ARGV[2]
local cursor = redis.call('HGET', KEYS[1], field)
if cursor and not above({}, { id, cursor }) then return 0 end
if not cursor and redis.call('HLEN', KEYS[1]) > tonumber(ARGV[3]) then
  local devices, behind, behindId = 0, nil, nil
  local cursors = redis.call('HGETALL', KEYS[1])
  for i = 1, #cursors, 2 do
    if string.sub(cursors[i], 1, 2) == 'd:' then
      devices = devices + 1
      if not behind or above({}, { behindId, cursors[i + 1] }) then behind, behindId = cursors[i], cursors[i + 1] end
    end
  end
  if devices >= tonumber(ARGV[3]) then redis.call('HDEL', KEYS[1], behind) end -- the farthest behind starts over
end
redis.call('HSET', KEYS[1], field, id)
redis.call('PEXPIRE', KEYS[1], 2 * ARGV[4])
return 1
