-- Removes consumers that hold nothing: XGROUP DELCONSUMER would lose their pending entries.
-- KEYS: 1 requests   ARGV: 1 group, 2 worker or '' for all, 3 least idle time in ms   Returns how many
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
local removed = 0
for _, row in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
  local facts = {}
  for i = 1, #row, 2 do facts[row[i]] = row[i + 1] end
  if facts.pending == 0 and facts.idle >= tonumber(ARGV[3]) and (ARGV[2] == '' or facts.name == ARGV[2]) then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], facts.name)
    removed = removed + 1
  end
end
return removed
