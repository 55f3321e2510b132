-- Sends the bodies in the file BENCH_BODIES, one a line, in turn; prints one line of JSON at the end.
-- With BENCH_OTHER_PATH, BENCH_OTHER_PERCENT (1 to 99) of the requests go to that path instead.
local bodies = {}
for line in io.lines(os.getenv("BENCH_BODIES")) do
  bodies[#bodies + 1] = line
end

wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"

local other, percent = os.getenv("BENCH_OTHER_PATH"), tonumber(os.getenv("BENCH_OTHER_PERCENT") or 0)

if other and percent > 0 then
  local requests, last = {}, 0
  function init(args)
    for index = 1, 100 do
      -- Evenly spread: 5 of 100 are every twentieth.
      local elsewhere = math.floor(index * percent / 100) > math.floor((index - 1) * percent / 100)
      requests[index] = wrk.format(nil, elsewhere and other or nil, nil, bodies[1])
    end
  end
  function request()
    last = last % 100 + 1
    return requests[last]
  end
elseif #bodies == 1 then
  -- Without a request() function wrk formats the request once: nothing of Lua is in the loop.
  wrk.body = bodies[1]
else
  local requests, last = {}, 0
  function init(args)
    for index, body in ipairs(bodies) do
      requests[index] = wrk.format(nil, nil, nil, body)
    end
  end
  function request()
    last = last % #requests + 1
    return requests[last]
  end
end

function done(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format(
    'BENCH {"requests":%d,"duration_s":%.6f,"bytes":%d,'
      .. '"errors":{"connect":%d,"read":%d,"write":%d,"timeout":%d,"status":%d},'
      .. '"latency_s":{"p50":%.6f,"p90":%.6f,"p99":%.6f,"p999":%.6f,"max":%.6f,"mean":%.6f}}\n',
    summary.requests, summary.duration / 1e6, summary.bytes,
    errors.connect, errors.read, errors.write, errors.timeout, errors.status,
    latency:percentile(50) / 1e6, latency:percentile(90) / 1e6, latency:percentile(99) / 1e6,
    latency:percentile(99.9) / 1e6, latency.max / 1e6, latency.mean / 1e6))
end
