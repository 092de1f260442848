-- Routes the frames of a generation to a node and reads its log, in one step: every frame is then either in
-- what was read or is sent to that node.
-- KEYS: 1 record, 2 log
-- ARGV: 1 node, 2 id that the client last saw or '', 3 most entries, 4 life in ms that a record has left when its log goes
-- Returns {'unknown'}
--       | {'whole', status, attempt, text, id of the last token or '', terminal frame (JSON), 1 when it ended just now}
--       | {'log', status, recovered 0|1, home node, entries}
local record = redis.call('HMGET', KEYS[1], 'status', 'attempt', 'node', 'routes', 'text', 'last', 'terminal',
  'whole')
local status = record[1]
if not status then return { 'unknown' } end
if record[5] and redis.call('EXISTS', KEYS[2]) == 0 then
  -- One that never had a log counts as one that has it for as long.
  local fresh = record[8] and redis.call('PTTL', KEYS[1]) > tonumber(ARGV[4])
  return { 'whole', status, record[2], record[5], record[6], record[7], fresh and 1 or 0 }
end
if status == 'queued' or status == 'running' then
  local routes = record[4] or ''
  if not string.find(',' .. routes .. ',', ',' .. ARGV[1] .. ',', 1, true) then
    redis.call('HSET', KEYS[1], 'routes', routes == '' and ARGV[1] or routes .. ',' .. ARGV[1])
  end
end
local from, recovered = '-', 1
if ARGV[2] ~= '' then
  local found = redis.call('XRANGE', KEYS[2], ARGV[2], ARGV[2], 'COUNT', 1)
  if #found == 1 then
    from = '(' .. ARGV[2]
  else
    recovered = 0
    if record[2] ~= '0' then from = record[2] .. '-0' end
  end
end
return { 'log', status, recovered, record[3] or '', redis.call('XRANGE', KEYS[2], from, '+', 'COUNT', ARGV[3]) }
