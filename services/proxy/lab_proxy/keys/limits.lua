-- Admit one request of a key, or report which limit refuses it and for how long. One script, because several processes
-- call it concurrently.
--
-- KEYS 1  hash: r, t   the theoretical arrival times (GCRA) of requests and of tokens, microseconds
--               full   when the bucket of tokens was last seen full
--               held   pico-dollars that admitted requests may still cost
--      2  sorted set: one member for each admitted request, scored by the time at which its slot expires
--      3  hash of the ledger: `total` and `day:…`, pico-dollars
-- ARGV 1-5  rpm, tpm, concurrency, budget of a day, budget in all; '' for none
--      6    tokens reserved      7  pico-dollars reserved      9  seconds of a slot
--      8    the request's member; '' for a local hit, which ends as soon as it is admitted, or for no request
--      10   the ledger's field for today      11  pico-dollars that the ledger does not have yet
--      12…  finished requests, four values each: member, tokens used, tokens reserved, time of admission;
--           without a member a correction: `reserved` is then the number of tokens that was sent before
--
-- Answers {verdict, now, wait, requests left, until requests are full, tokens left, until tokens are full}, times in
-- microseconds. Verdicts: 0 admitted, 1 budget of the day, 2 budget in all, 3 concurrency, 4 rpm, 5 tpm, 6 too large.
-- For a refused request only the finished ones are written.

local MINUTE = 60000000
local state, slots, sums = KEYS[1], KEYS[2], KEYS[3]
local clock = redis.call('TIME')
local now = clock[1] * 1000000 + clock[2]
local rpm, tpm, most = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local day, total = tonumber(ARGV[4]), tonumber(ARGV[5])
local tokens, cost = tonumber(ARGV[6]), tonumber(ARGV[7])

local read = redis.call('HMGET', state, 'r', 't', 'full', 'held')
local r, t = tonumber(read[1] or 0), tonumber(read[2] or 0)
local full, held = tonumber(read[3] or 0), tonumber(read[4] or 0)
local changed = false

-- 1. Finished requests: release slot and reservation, keep the used tokens. Each counts once: its member exists once.
local function over(member)
  held = math.max(0, held - tonumber(string.match(member, ':(%d+)$') or 0))
  changed = true
end
for _, member in ipairs(redis.call('ZRANGEBYSCORE', slots, '-inf', now)) do over(member) end
if changed then redis.call('ZREMRANGEBYSCORE', slots, '-inf', now) end
for i = 12, #ARGV, 4 do
  local correction = ARGV[i] == ''
  if correction or redis.call('ZREM', slots, ARGV[i]) == 1 then
    if correction then changed = true else over(ARGV[i]) end
    local unused = tonumber(ARGV[i + 2]) - tonumber(ARGV[i + 1])
    -- A bucket that has been full since then no longer holds the reservation: a refund would allow a second burst.
    if tpm and not (unused > 0 and full > tonumber(ARGV[i + 3])) then
      t = t - unused * MINUTE / tpm
    end
  end
end

-- 2. Check the limits.
local verdict, wait = 0, 0
local function refuse(why, time)
  if verdict == 0 or (verdict >= 3 and time > wait) then verdict, wait = why, time end
end
if day or total then
  local spent = redis.call('HMGET', sums, ARGV[10], 'total')
  local more = held + tonumber(ARGV[11])
  if total and tonumber(spent[2] or 0) + more >= total then refuse(2, 0)
  elseif day and tonumber(spent[1] or 0) + more >= day then refuse(1, 0) end
end
if verdict == 0 then
  if most and redis.call('ZCARD', slots) >= most then refuse(3, 1000000) end
  if rpm then
    local step = MINUTE / rpm
    local early = math.max(r, now) + step - now - MINUTE
    if early > 1 then refuse(4, early) end
  end
  if tpm then
    if tokens > tpm then verdict, wait = 6, 0
    else
      local early = math.max(t, now) + tokens * MINUTE / tpm - now - MINUTE
      if early > 1 then refuse(5, early) end
    end
  end
end

-- 3. Admit the request.
if verdict == 0 and rpm then
  r = math.max(r, now) + MINUTE / rpm
  changed = true
end
if verdict == 0 and ARGV[8] ~= '' then
  if tpm then
    if t <= now then full = now end
    t = math.max(t, now) + tokens * MINUTE / tpm
  end
  held = held + cost
  redis.call('ZADD', slots, now + ARGV[9] * 1000000, ARGV[8])
  redis.call('EXPIRE', slots, ARGV[9] * 2)
  changed = true
end
if changed then
  redis.call('HSET', state, 'r', string.format('%.2f', r), 't', string.format('%.2f', t),
    'full', string.format('%.0f', full), 'held', string.format('%.0f', held))
  local last = math.max(r, t, now + ARGV[9] * 1000000)
  redis.call('PEXPIREAT', state, string.format('%.0f', last / 1000 + 60000))
end

local function left(limit, at)
  if not limit then return -1, 0 end
  local until_full = math.max(0, at - now)
  return math.max(0, math.floor((MINUTE - until_full) * limit / MINUTE + 0.001)), math.ceil(until_full)
end
local requests, requests_full = left(rpm, r)
return {verdict, now, math.ceil(wait), requests, requests_full, left(tpm, t)}
