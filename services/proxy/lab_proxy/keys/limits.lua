-- Admits one request of a key, or one call of an upstream with a cap that all keys share; otherwise reports which limit
-- refuses it and for how long. It is one script because several processes call it concurrently.
--
-- KEYS 1  hash: r, t   the theoretical arrival times (GCRA) of requests and of tokens, microseconds
--               full   when the bucket of tokens was last seen full
--               held   pico-dollars that admitted requests may still cost
--      2  sorted set: one member for each admitted request, scored by the time at which its slot expires
--      3  hash of the ledger: `total` and `day:…`, pico-dollars; for a cap the day's: `total`, and each key
--      For a cap also:
--      4  hash: for each active key `…:r` and `…:t`, its use of requests and of tokens, and `…:at`, the time of both.
--         A use is in microseconds in which the whole cap refills it; it shrinks by the key's share of that.
--      5  sorted set of the active keys, scored by the time of their last call
-- ARGV 1-5  rpm, tpm, concurrency, budget of a day, total budget; '' for none
--      6    tokens reserved      7  pico-dollars reserved      9  seconds of a slot
--      8    the request's member; '' for a local hit, which ends as soon as it is admitted, or for no request
--      10   the ledger's field for today      11  pico-dollars that the ledger does not have yet
--      12   for a cap the key that calls, else ''
--      13…  finished requests, four values each: member, tokens used, tokens reserved, time of admission;
--           without a member a correction: `reserved` is then the number of tokens that was sent before
--
-- Returns {verdict, now, wait, requests left, until requests are full, tokens left, until tokens are full}, times in
-- microseconds. Verdicts: 0 admitted, 1 budget of the day, 2 total budget, 3 concurrency, 4 rpm, 5 tpm, 6 too large,
-- and of a cap that has room, but not for a key beyond its share: 7 requests, 8 tokens, 9 budget of the day.
-- A refused request writes only the finished ones and that its key is active.

local MINUTE = 60000000
local KEPT = 0.25 -- of a cap: this last part of it is for keys within their share
local state, slots, sums = KEYS[1], KEYS[2], KEYS[3]
local clock = redis.call('TIME')
local now = clock[1] * 1000000 + clock[2]
local rpm, tpm, most = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local day, total = tonumber(ARGV[4]), tonumber(ARGV[5])
local tokens, cost = tonumber(ARGV[6]), tonumber(ARGV[7])
local shares, active, caller = KEYS[4], KEYS[5], ARGV[12]

local read = redis.call('HMGET', state, 'r', 't', 'full', 'held')
local r, t = tonumber(read[1] or 0), tonumber(read[2] or 0)
local full, held = tonumber(read[3] or 0), tonumber(read[4] or 0)
local changed = false

-- 0. The keys that share a cap, and the use of the one that calls.
local sharers, used_r, used_t = 1, 0, 0
if shares then
  for _, key in ipairs(redis.call('ZRANGEBYSCORE', active, '-inf', now - MINUTE)) do
    redis.call('HDEL', shares, key .. ':r', key .. ':t', key .. ':at')
    redis.call('ZREM', active, key)
  end
  if ARGV[8] ~= '' then redis.call('ZADD', active, now, caller) end
  sharers = math.max(1, redis.call('ZCARD', active))
  local use = redis.call('HMGET', shares, caller .. ':r', caller .. ':t', caller .. ':at')
  local shrunk = (now - tonumber(use[3] or now)) / sharers
  used_r = math.max(0, tonumber(use[1] or 0) - shrunk)
  used_t = math.max(0, tonumber(use[2] or 0) - shrunk)
end

-- 1. Finished requests: release slot and reservation, keep the used tokens. Each counts once: its member exists once.
local function over(member)
  held = math.max(0, held - tonumber(string.match(member, ':(%d+)$') or 0))
  changed = true
end
for _, member in ipairs(redis.call('ZRANGEBYSCORE', slots, '-inf', now)) do over(member) end
if changed then redis.call('ZREMRANGEBYSCORE', slots, '-inf', now) end
for i = 13, #ARGV, 4 do
  local correction = ARGV[i] == ''
  if correction or redis.call('ZREM', slots, ARGV[i]) == 1 then
    if correction then changed = true else over(ARGV[i]) end
    local unused = tonumber(ARGV[i + 2]) - tonumber(ARGV[i + 1])
    -- A bucket that has been full since then no longer holds the reservation: a refund would allow a second burst.
    if tpm and not (unused > 0 and full > tonumber(ARGV[i + 3])) then
      t = t - unused * MINUTE / tpm
      used_t = math.max(0, used_t - unused * MINUTE / tpm)
    end
  end
end

-- 2. Check the limits.
local verdict, wait = 0, 0
local function refuse(why, time)
  if verdict == 0 or (verdict >= 3 and time > wait) then verdict, wait = why, time end
end
-- How long a key must wait for `more` of a cap that has room after `early`: also until it is within its share, or until
-- the cap has more room than the kept part. A key without a use is always within its share, however large its request.
local function fair(early, used, more)
  local beyond = math.min(used, used + more - MINUTE / sharers)
  if sharers == 1 or beyond <= 0 then return early end
  return math.max(early, math.min(early + KEPT * MINUTE, beyond * sharers))
end
if day or total then
  local spent = redis.call('HMGET', sums, ARGV[10], 'total')
  local more = held + tonumber(ARGV[11])
  if total and tonumber(spent[2] or 0) + more >= total then refuse(2, 0)
  elseif day and tonumber(spent[1] or 0) + more >= day then refuse(1, 0)
  elseif shares and tonumber(spent[1] or 0) + more >= day * (1 - KEPT) then
    local own, keys = redis.call('HGET', sums, caller), redis.call('HLEN', sums) - 1
    if own and keys > 1 and tonumber(own) >= day / keys then refuse(9, 0) end
  end
end
if verdict == 0 then
  if most and redis.call('ZCARD', slots) >= most then refuse(3, 1000000) end
  if rpm then
    local step = MINUTE / rpm
    local early = math.max(r, now) + step - now - MINUTE
    local fairly = fair(early, used_r, step)
    if early > 1 then refuse(4, fairly) elseif fairly > 1 then refuse(7, fairly) end
  end
  if tpm then
    if tokens > tpm then verdict, wait = 6, 0
    else
      local early = math.max(t, now) + tokens * MINUTE / tpm - now - MINUTE
      local fairly = fair(early, used_t, tokens * MINUTE / tpm)
      if early > 1 then refuse(5, fairly) elseif fairly > 1 then refuse(8, fairly) end
    end
  end
end

-- 3. Admit the request.
if verdict == 0 and rpm then
  r = math.max(r, now) + MINUTE / rpm
  used_r = used_r + MINUTE / rpm
  changed = true
end
if verdict == 0 and ARGV[8] ~= '' then
  if tpm then
    if t <= now then full = now end
    t = math.max(t, now) + tokens * MINUTE / tpm
    used_t = used_t + tokens * MINUTE / tpm
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
  if shares and redis.call('ZSCORE', active, caller) then
    redis.call('HSET', shares, caller .. ':r', string.format('%.2f', used_r), caller .. ':t', string.format('%.2f', used_t),
      caller .. ':at', string.format('%.0f', now))
  end
end
if shares then
  redis.call('EXPIRE', shares, 120)
  redis.call('EXPIRE', active, 120)
end

local function left(limit, at)
  if not limit then return -1, 0 end
  local until_full = math.max(0, at - now)
  return math.max(0, math.floor((MINUTE - until_full) * limit / MINUTE + 0.001)), math.ceil(until_full)
end
local requests, requests_full = left(rpm, r)
return {verdict, now, math.ceil(wait), requests, requests_full, left(tpm, t)}
