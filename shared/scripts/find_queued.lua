-- Finds a request in the stream or the retry set. Rare, and the stream is bounded, so a scan is fair.
-- KEYS: 1 requests, 2 retries   ARGV: 1 user, 2 message id
-- Returns the number of requests ahead, or -1 when it is nowhere
if redis.call('ZSCORE', KEYS[2], ARGV[1] .. ' ' .. ARGV[2]) then return redis.call('XLEN', KEYS[1]) end
local from, position = '-', 0
repeat
  local page = redis.call('XRANGE', KEYS[1], from, '+', 'COUNT', 500)
  for _, entry in ipairs(page) do
    if entry[2][2] == ARGV[1] and entry[2][4] == ARGV[2] then return position end
    position = position + 1
    from = '(' .. entry[1]
  end
until #page < 500
return -1
