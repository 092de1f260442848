-- Keeps the presence entry of an open connection: its life, or the entry itself when it was lost or taken for a
-- ghost's. Where the number of connections is limited, one that was replaced does not come back.
-- KEYS: 1 connections
-- ARGV: 1 connection, 2 its entry (JSON), 3 most connections (-1 the newest only), 4 life in ms, 5 '1' when a named
--       device replaces itself
-- Returns 1, or 0 when it has no place any more
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 then
  local most = tonumber(ARGV[3])
  if redis.call('HLEN', KEYS[1]) >= math.max(1, most) then return 0 end
  local own = cjson.decode(ARGV[2])
  if ARGV[5] == '1' and own.device ~= 'default' then
    for _, json in ipairs(redis.call('HVALS', KEYS[1])) do
      local other = cjson.decode(json)
      if other.device == own.device and other.since > own.since then return 0 end
    end
  end
  redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
end
redis.call('PEXPIRE', KEYS[1], ARGV[4])
return 1
