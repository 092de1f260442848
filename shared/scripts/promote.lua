-- Moves due retries back into the request stream.
-- KEYS: 1 requests, 2 retries   ARGV: 1 most   Returns how many
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local due = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now, 'LIMIT', 0, ARGV[1])
for _, member in ipairs(due) do
  local user, message = string.match(member, '^(%S+) (%S+)$')
  redis.call('XADD', KEYS[1], '*', 'user', user, 'message', message)
  redis.call('ZREM', KEYS[2], member)
end
return #due
