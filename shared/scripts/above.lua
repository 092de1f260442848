-- Whether an inbox id is above another, for scripts that include it.   ARGV: 1, 2 the ids   Returns true or false
local aMs, aSeq = string.match(ARGV[1], '^(%d+)%-(%d+)$')
local bMs, bSeq = string.match(ARGV[2], '^(%d+)%-(%d+)$')
aMs, bMs = tonumber(aMs), tonumber(bMs)
return aMs > bMs or (aMs == bMs and tonumber(aSeq) > tonumber(bSeq))
