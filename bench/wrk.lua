-- wrk … -s bench/wrk.lua URL -- BODY_FILE NONCE [KEY]
-- Posts the file's JSON. Where it holds @@, each request gets a number of its own there: no two are the same to a cache.
function init(args)
  local file = assert(io.open(args[1], "rb"))
  local body = file:read("*a")
  file:close()
  wrk.method = "POST"
  wrk.headers["content-type"] = "application/json"
  if args[3] then
    wrk.headers["authorization"] = "Bearer " .. args[3]
  end
  local from, to = body:find("@@", 1, true)
  wrk.body = body
  if from then
    local before, after, count = body:sub(1, from - 1) .. args[2], body:sub(to + 1), 0
    request = function()
      count = count + 1
      return wrk.format(nil, nil, nil, before .. count .. after)
    end
  end
end

function done(summary, latency)
  local errors = summary.errors
  io.write(string.format(
    'told {"requests": %d, "seconds": %.6f, "p50_ms": %.4f, "p99_ms": %.4f, "errors": %d}\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
