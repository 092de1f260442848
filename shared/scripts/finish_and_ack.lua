-- @include finish
-- The end of an answer in one step, where one server holds both slots: the record and its log, then the request.
-- KEYS: 1 to 4 as finish.lua takes them, 5 requests
-- ARGV: 1 to 14 as finish.lua takes them, 15 group, 16 entry
-- Returns what finish.lua returns; the request is acknowledged only when it has ended. Nobody asks whose the entry is:
-- the attempt was ours, so whoever claimed the entry meanwhile has nothing to do.
local finished = finish(KEYS, ARGV)
if finished[1] == 'ended' then
  redis.pcall('XACK', KEYS[5], ARGV[15], ARGV[16])
  redis.call('XDEL', KEYS[5], ARGV[16])
end
return finished
