-- @include admit
-- @include enqueue
-- @include forget
-- Admission in one step, where one server holds both slots: the record, then the request, and neither without the
-- other.
-- KEYS: 1 record, 2 the user's open generations, 3 requests, 4 retries, then what admit.lua takes beyond its second
-- ARGV: 1 user, 2 bound of the queue, 3 trace context or '', 4 most bytes of a payload that goes with the request,
--       then what admit.lua takes
-- Returns {what admit.lua returns} or, when it was created, {that, what enqueue.lua returns}
local recordKeys, admitArguments = { KEYS[1], KEYS[2] }, {}
for i = 5, #KEYS do recordKeys[i - 2] = KEYS[i] end
for i = 5, #ARGV do admitArguments[i - 4] = ARGV[i] end
local admitted = admit(recordKeys, admitArguments)
if admitted[1] ~= 'created' then return { admitted } end
local payload = #admitArguments[3] <= tonumber(ARGV[4]) and admitArguments[3] or ''
local queued = enqueue({ KEYS[3], KEYS[4] }, { ARGV[2], ARGV[1], admitArguments[1], ARGV[3], payload })
if queued[1] < 0 then forget(recordKeys, { admitArguments[1] }) end
return { admitted, queued }
