-- Renews a claim, or lets go of it; never touches what somebody else has put there since.
-- KEYS: 1 a claim   ARGV: 1 what was written there, 2 its life in ms, 0 to let go   Returns 1, or 0 when it is not ours
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
if ARGV[2] == '0' then return redis.call('DEL', KEYS[1]) end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
