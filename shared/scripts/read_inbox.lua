-- A page of an inbox, and whether messages before it were dropped.
-- KEYS: 1 inbox, 2 cursors   ARGV: 1 id to start after or '', 2 most messages in a page
-- Returns {dropped up to or '', page}
local page = redis.call('XRANGE', KEYS[1], ARGV[1] == '' and '-' or '(' .. ARGV[1], '+', 'COUNT', ARGV[2])
return { redis.call('HGET', KEYS[2], 'dropped') or '', page }
