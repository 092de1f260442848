-- A node says that nobody on it listens to this generation any more.
-- KEYS: 1 record   ARGV: 1 node
local routes = redis.call('HGET', KEYS[1], 'routes')
if not routes then return 0 end
local kept = {}
for node in string.gmatch(routes, '[^,]+') do
  if node ~= ARGV[1] then kept[#kept + 1] = node end
end
redis.call('HSET', KEYS[1], 'routes', table.concat(kept, ','))
return 1
