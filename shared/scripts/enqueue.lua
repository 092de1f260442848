-- Appends a request below the bound of its node. Waiting, running and backing-off requests all count.
-- KEYS: 1 requests, 2 retries   ARGV: 1 bound, 2 user, 3 message id, 4 trace context or '', 5 payload (JSON) or ''
-- Returns {position} | {-1, how many wait} when it is full
local length = redis.call('XLEN', KEYS[1])
local waiting = length + redis.call('ZCARD', KEYS[2])
if waiting >= tonumber(ARGV[1]) then return { -1, waiting } end
local fields = { 'user', ARGV[2], 'message', ARGV[3] }
if ARGV[4] ~= '' then fields[5], fields[6] = 'trace', ARGV[4] end
-- In a long line the copies of payloads would weigh on whoever looks for a place in it, and save nobody any time.
if ARGV[5] ~= '' and length * #ARGV[5] <= 1048576 then fields[#fields + 1], fields[#fields + 2] = 'payload', ARGV[5] end
redis.call('XADD', KEYS[1], '*', unpack(fields))
return { length }
