-- Takes a write and takes it back, which nobody sees: refused as any other is (too few replicas, a full disk, no memory).
-- KEYS: 1 workers   Returns 1
redis.call('HSET', KEYS[1], 'proof', '')
return redis.call('HDEL', KEYS[1], 'proof')
