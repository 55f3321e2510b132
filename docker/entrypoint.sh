#!/bin/bash
# What the container is:
#
#   head [OPTION...]              the head of a Ray cluster
#   worker HOST:PORT [OPTION...]  a worker of the cluster whose head is there
#   COMMAND [ARGUMENT...]         anything else: rayprism, serve, ray, python, ...
#
# Options go to `ray start`, after those that are given here. `health` is for the container engine.
set -eu

node_file=${TMPDIR:-/tmp}/.rayprism-node
# Of Ray's agent on this node.
agent_port=${RAYPRISM_AGENT_PORT:-52365}

start_node() {
  : >"$node_file"
  # HAProxy does not start with the 1,024 files that some engines allow at first.
  ulimit -Sn 65536 2>/dev/null || ulimit -Sn "$(ulimit -Hn)"
  exec rayprism environment ray start --block --disable-usage-stats --log-color=false \
    --dashboard-agent-listen-port="$agent_port" "$@"
}

case "${1:-}" in
head)
  shift
  # There is no other head to which anything could move.
  export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S="${RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S:-0}"
  start_node --head --port=6379 --dashboard-host=0.0.0.0 "$@"
  ;;
worker)
  case "${2:-}" in
  '' | -*)
    echo "worker: say where the head is, as in: worker head:6379" >&2
    exit 2
    ;;
  esac
  address=$2
  shift 2
  start_node --address="$address" "$@"
  ;;
health)
  # One that is no node has nothing to answer with.
  [ -e "$node_file" ] || exit 0
  # It knows of the raylet, and on the head of the GCS.
  exec python3 -Ic '
import sys
from http.client import HTTPConnection
connection = HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=4)
connection.request("GET", "/api/healthz")
answer = connection.getresponse()
print(answer.read().decode())
raise SystemExit(answer.status != 200)' "$agent_port"
  ;;
'')
  echo "say what to run: head, worker HOST:PORT, or a command" >&2
  exit 2
  ;;
*)
  exec "$@"
  ;;
esac
