-- @include finish
-- @include ack
-- The end of an answer in one step, where one server holds both slots: the record and its log, then the request.
-- KEYS: 1 requests, then what finish.lua takes
-- ARGV: 1 group, 2 worker, 3 entry, then what finish.lua takes
-- Returns what finish.lua returns; the request is acknowledged only when it has ended
local finishKeys, finishArguments = {}, {}
for i = 2, #KEYS do finishKeys[i - 1] = KEYS[i] end
for i = 4, #ARGV do finishArguments[i - 3] = ARGV[i] end
local finished = finish(finishKeys, finishArguments)
if finished[1] == 'ended' then ack({ KEYS[1] }, { ARGV[1], ARGV[2], ARGV[3] }) end
return finished
