"""What the broker does, at once and undivided, when a process tells what it holds of a service and what it wants.

KEYS[1]: {instance: what it told last, and the starts that were given to it since}. KEYS[2]: {next: when the next call may begin,
turn: a counter}. Times are the broker's own, in seconds. -> {delays of the places given, delays of the further starts}.

Whoever tells something lets everybody's claims be settled: the next place goes to the owner that holds fewest, of those to the one
that was served longest ago. Nobody passes the first in this order, so that one with a smaller limit is not kept out for ever.
"""

SCRIPT = """
local me, owner, sequence, held, wanted, starts, leaves = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5]),
  tonumber(ARGV[6]), ARGV[7] == '1'
local limit, rate, ahead, lease, settle = tonumber(ARGV[8]), tonumber(ARGV[9]), tonumber(ARGV[10]), tonumber(ARGV[11]), tonumber(ARGV[12])
local WAITS = 2

local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
local uptime = tonumber(string.match(redis.call('INFO', 'server'), 'uptime_in_seconds:(%d+)')) - 1 -- it may say up to 1 too much
local next_start = tonumber(redis.call('HGET', KEYS[2], 'next') or 0)

local all, held_by, total = {}, {}, 0
local rows = redis.call('HGETALL', KEYS[1])
for i = 1, #rows, 2 do
  local entry = cmsgpack.unpack(rows[i + 1])
  if entry.expires > now or rows[i] == me then all[rows[i]] = entry else redis.call('HDEL', KEYS[1], rows[i]) end
end
if all[me] and all[me].sequence >= sequence then return {{}, {}} end
if leaves then
  redis.call('HDEL', KEYS[1], me)
  return {{}, {}}
end

local mine = all[me] or {given = {}, turn = redis.call('HINCRBY', KEYS[2], 'turn', 1)}
mine.owner, mine.sequence, mine.wanted, mine.limit, mine.rate = owner, sequence, wanted, limit, rate
mine.expires, mine.waits_until = now + lease, now + WAITS
while #mine.given > wanted do table.remove(mine.given) end
mine.held = held
all[me] = mine
for _, entry in pairs(all) do
  if entry.waits_until <= now then entry.given = {} end -- given to one that has not come for it
  local number = entry.held + #entry.given
  held_by[entry.owner] = (held_by[entry.owner] or 0) + number
  total = total + number
end

local function start_of_call(entry)
  if entry.rate == 0 then return now end
  local start = math.max(now, next_start)
  if start > now + ahead then return nil end
  next_start = start + 1 / entry.rate
  redis.call('HSET', KEYS[2], 'next', string.format('%.6f', next_start))
  return start
end

local function first_in_turn()
  local first = nil
  for _, entry in pairs(all) do
    if entry.wanted > #entry.given and entry.waits_until > now then
      local number, least = held_by[entry.owner], first and held_by[first.owner]
      if not first or number < least or (number == least and entry.turn < first.turn) then first = entry end
    end
  end
  return first
end

local further = {}
if uptime >= settle then
  while #further < starts do
    local start = start_of_call(mine)
    if not start then break end
    table.insert(further, tostring(start - now))
  end
  while true do
    local first = first_in_turn()
    if not first or total >= first.limit then break end
    local start = start_of_call(first)
    if not start then break end
    table.insert(first.given, start)
    first.turn = redis.call('HINCRBY', KEYS[2], 'turn', 1)
    held_by[first.owner] = held_by[first.owner] + 1
    total = total + 1
  end
end

local delays = {}
for _, start in ipairs(mine.given) do table.insert(delays, tostring(math.max(0, start - now))) end
mine.held, mine.wanted, mine.given = held + #delays, wanted - #delays, {}
for name, entry in pairs(all) do redis.call('HSET', KEYS[1], name, cmsgpack.pack(entry)) end
redis.call('EXPIRE', KEYS[1], 3600)
redis.call('EXPIRE', KEYS[2], 3600)
return {delays, further}
"""
