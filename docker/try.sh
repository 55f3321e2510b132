#!/usr/bin/env bash
# Looks an image over from inside, then serves the demo's model: docker/build_local.sh try.
set -euo pipefail

[ "$(id -u)" != 0 ]
echo "user      $(id -u):$(id -g)"
echo "python    $(python --version), $(rayprism --version)"

# What could build or fetch more programs, and files that only a compiler reads.
for tool in gcc cc g++ c++ clang ld as make cmake cargo git curl wget; do
  if command -v "$tool"; then exit 1; fi
done
if dpkg-query --show --showformat '${Package}\n' | grep -E -- '-dev$|^build-essential$'; then exit 1; fi
if python -m pip --version 2>/dev/null; then exit 1; fi
echo "tools     no compiler, make, git or curl"

# Of all that is in the image, only what is meant to be written can be.
echo "writable  $(find / -xdev -type d -writable -not -path '/proc/*' -not -path '/tmp/*' 2>/dev/null | sort | xargs)"

rayprism-entrypoint head --num-cpus=2 --object-store-memory=200000000 >/tmp/head.log 2>&1 &
head=$!
trap 'tail -n 30 /tmp/head.log /tmp/ray/session_latest/logs/{dashboard,dashboard_ServeHead}.log; kill $head' ERR
SECONDS=0
until rayprism-entrypoint health 2>/dev/null | grep -q success; do
  if [ $SECONDS -gt 120 ]; then false; fi
  sleep 1
done
echo "healthy   after $SECONDS s: $(rayprism-entrypoint health | xargs)"

serve deploy /serve.yaml
rayprism wait --timeout 180
python - <<'PYTHON'
from urllib.request import Request, urlopen

url = "http://127.0.0.1:8000/v2/models/flights/infer"
request = Request(url, open("/rows.json", "rb").read(), {"Content-Type": "application/json"})
answer = urlopen(request, timeout=30)
print("answer   ", answer.status, answer.read().decode()[:200])
PYTHON

SECONDS=0
kill -TERM $head
status=0
wait $head || status=$?
echo "ended     after $SECONDS s with $status"
if rayprism-entrypoint health 2>/dev/null; then exit 1; fi
