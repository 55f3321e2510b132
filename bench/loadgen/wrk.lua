-- Sends the bodies in the file BENCH_BODIES, one a line, in turn. At the end it prints one line of
-- JSON, and writes each latency in microseconds, with how often wrk counted it, to the file
-- BENCH_LATENCIES.
local bodies = {}
for line in io.lines(os.getenv("BENCH_BODIES")) do
  bodies[#bodies + 1] = line
end

wrk.method = "POST"

if #bodies == 1 then
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
  local file = assert(io.open(os.getenv("BENCH_LATENCIES"), "w"))
  for index = 1, #latency do
    local value, count = latency(index)
    file:write(string.format("%d %d\n", value, count))
  end
  file:close()
  local errors = summary.errors
  io.write(string.format(
    'BENCH {"answered":%d,"duration_us":%d,'
      .. '"errors":{"connect":%d,"read":%d,"write":%d,"timeout":%d,"status":%d}}\n',
    summary.requests, summary.duration,
    errors.connect, errors.read, errors.write, errors.timeout, errors.status))
end
