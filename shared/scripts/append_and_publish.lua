-- Appends a text to each of several logs and, where one server holds all of it, publishes the frames in the same step: a
-- round trip less where few answers have text at once. Nothing is published unless every log has taken its text.
-- KEYS: 1 the reply stream of the node that wants them, then the logs
-- ARGV: 1 how many arguments of the publishing XADD follow, these, then an id and a text for each log
-- Returns {published 0|1, then for each log: 1 | nil: it is gone | what Redis refused it with}
local results, published = { 1 }, true
local at = tonumber(ARGV[1]) + 2
for i = 2, #KEYS do
  local taken = redis.pcall('XADD', KEYS[i], 'NOMKSTREAM', ARGV[at], 'token', ARGV[at + 1])
  if type(taken) == 'string' then results[i] = 1
  else
    results[i] = taken
    published = false
  end
  at = at + 2
end
if published then redis.call('XADD', KEYS[1], unpack(ARGV, 2, tonumber(ARGV[1]) + 1))
else results[1] = 0 end
return results
