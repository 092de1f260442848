-- @include admit
-- @include enqueue
-- @include forget
-- Admission in one step, where one server holds both slots: the record, then the request, and neither without the
-- other.
-- KEYS: 1 to 4 as admit.lua takes them, 5 requests, 6 retries
-- ARGV: 1 to 9 as admit.lua takes them, 10 bound of the queue, 11 user, 12 most bytes of a payload that goes with the
--       request
-- Returns {what admit.lua returns} or, when it was created, {that, what enqueue.lua returns}
local admitted = admit(KEYS, ARGV)
if admitted[1] ~= 'created' then return { admitted } end
local payload = #ARGV[3] <= tonumber(ARGV[12]) and ARGV[3] or ''
local queued = enqueue({ KEYS[5], KEYS[6] }, { ARGV[10], ARGV[11], ARGV[1], ARGV[9], payload })
if queued[1] < 0 then forget(KEYS, ARGV) end
return { admitted, queued }
