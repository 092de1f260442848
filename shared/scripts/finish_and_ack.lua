-- @include finish
-- The end of an answer in one step, where one server holds both slots: the record and its log, then the request.
-- KEYS: 1 requests, then what finish.lua takes
-- ARGV: 1 group, 2 entry, then what finish.lua takes
-- Returns what finish.lua returns; the request is acknowledged only when it has ended. Nobody asks whose the entry is:
-- the attempt was ours, so whoever claimed the entry meanwhile has nothing to do.
local finishKeys, finishArguments = {}, {}
for i = 2, #KEYS do finishKeys[i - 1] = KEYS[i] end
for i = 3, #ARGV do finishArguments[i - 2] = ARGV[i] end
local finished = finish(finishKeys, finishArguments)
if finished[1] == 'ended' then
  redis.pcall('XACK', KEYS[1], ARGV[1], ARGV[2])
  redis.call('XDEL', KEYS[1], ARGV[2])
end
return finished
