-- Forgets which generation a chat of the AI SDK has, once its end has reached a client.
-- KEYS: 1 the chat's key   ARGV: 1 message id   Returns 1 when it was that one
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1])
