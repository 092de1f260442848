-- Removes a cancelled request that no worker holds; one that is held is acknowledged by its worker.
-- KEYS: 1 requests, 2 retries   ARGV: 1 group, 2 user, 3 message id   Returns 1 when something was removed
if redis.call('ZREM', KEYS[2], ARGV[2] .. ' ' .. ARGV[3]) == 1 then return 1 end
local from = '-'
repeat
  local page = redis.call('XRANGE', KEYS[1], from, '+', 'COUNT', 500)
  for _, entry in ipairs(page) do
    if entry[2][2] == ARGV[2] and entry[2][4] == ARGV[3] then
      local ok, pending = pcall(redis.call, 'XPENDING', KEYS[1], ARGV[1], entry[1], entry[1], 1)
      if ok and type(pending) == 'table' and #pending == 0 then return redis.call('XDEL', KEYS[1], entry[1]) end
      return 0
    end
    from = '(' .. entry[1]
  end
until #page < 500
return 0
