-- Moves a device's cursor forward, never back and never beyond what is there.
-- KEYS: 1 cursors, 2 inbox   ARGV: 1 device, 2 id, 3 most devices, 4 life of the cursors in ms
-- Returns 1 when it moved
local function above(a, b)
  local aMs, aSeq = string.match(a, '^(%d+)%-(%d+)$')
  local bMs, bSeq = string.match(b, '^(%d+)%-(%d+)$')
  aMs, bMs = tonumber(aMs), tonumber(bMs)
  return aMs > bMs or (aMs == bMs and tonumber(aSeq) > tonumber(bSeq))
end
local field = 'd:' .. ARGV[1]
local top = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)
if not top[1] then return 0 end
local id = above(ARGV[2], top[1][1]) and top[1][1] or ARGV[2]
local cursor = redis.call('HGET', KEYS[1], field)
if cursor and not above(id, cursor) then return 0 end
if not cursor and redis.call('HLEN', KEYS[1]) > tonumber(ARGV[3]) then
  local behind, behindId
  local cursors = redis.call('HGETALL', KEYS[1])
  for i = 1, #cursors, 2 do
    if cursors[i] ~= 'dropped' and (not behind or above(behindId, cursors[i + 1])) then
      behind, behindId = cursors[i], cursors[i + 1]
    end
  end
  redis.call('HDEL', KEYS[1], behind) -- the device that is farthest behind starts over
end
redis.call('HSET', KEYS[1], field, id)
redis.call('PEXPIRE', KEYS[1], ARGV[4])
return 1
