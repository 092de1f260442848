-- @include above
-- A page of an inbox, and up to where messages before it were dropped; what is too old counts as dropped.
-- KEYS: 1 inbox, 2 cursors
-- ARGV: 1 id to start after or '', 2 most messages in a page, 3 how long messages are kept, in ms
-- Returns {start, dropped up to or '', page}; the start is the one asked for, but not beyond what is or was there, or
-- what comes next would look like a double
local time = redis.call('TIME')
local oldest = string.format('%.0f', math.max(0, time[1] * 1000 + math.floor(time[2] / 1000) - ARGV[3]))
local kept = redis.call('HMGET', KEYS[2], 'dropped', 'top')
local last = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
local aged = redis.call('XREVRANGE', KEYS[1], '(' .. oldest .. '-0', '-', 'COUNT', 1)[1]
-- An inbox that is empty has expired whole.
local dropped = aged and aged[1] or not last and kept[2] or kept[1] or ''
local top = last and last[1] or kept[2]
local start = ARGV[1]
if start ~= '' then
  if not top then start = '' elseif above({}, { start, top }) then start = top end
end
if dropped ~= '' and start ~= '' and not above({}, { dropped, start }) then dropped = '' end
local from = dropped ~= '' and dropped or start
local page = redis.call('XRANGE', KEYS[1], from == '' and '-' or '(' .. from, '+', 'COUNT', ARGV[2])
return { start, dropped, page }
