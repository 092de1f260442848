-- Adds members to a set below its bound: the members of a group, or the groups of a user.
-- KEYS: 1 set   ARGV: 1 bound, 2... members   Returns the size, or -1 when they do not all fit
local new = 0
for i = 2, #ARGV do
  if redis.call('SISMEMBER', KEYS[1], ARGV[i]) == 0 then new = new + 1 end
end
if new > 0 and redis.call('SCARD', KEYS[1]) + new > tonumber(ARGV[1]) then return -1 end
for i = 2, #ARGV do redis.call('SADD', KEYS[1], ARGV[i]) end
return redis.call('SCARD', KEYS[1])
