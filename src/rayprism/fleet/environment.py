"""The environment that Ray Serve needs before it starts: most of its tuning is only there."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from rayprism.fleet.processes import MARKER_VARIABLE, find_port
from rayprism.models.fields import DATA_VARIABLE, REPOSITORY_VARIABLE

__all__ = ["cluster_environment", "node_variables", "search_path"]

_PORTS = {
    "RAY_SERVE_HAPROXY_METRICS_PORT": 9101,
    "RAY_SERVE_HAPROXY_STATS_PORT": 8404,
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": 8500,
    "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": 9500,
}
"""Ports that Serve opens besides its public ones, with its defaults.

Source: Ray 2.60, serve/_private/constants.py.
"""

_RETRY_LINES = (
    # A replica that dies with a request in hand has not answered: another one may.
    "conn-failure empty-response",
    # Serve writes the value into HAProxy's `defaults` as it is, and has no variable for these
    # (docs/decisions/0017). Only a request that was there as a whole before it went to a replica
    # can go to another one,
    "option http-buffer-request",
    # and a node that fell silent is told from a model that takes its time.
    "option srvtcpka",
    "srvtcpka-idle 2s",
    "srvtcpka-intvl 1s",
    "srvtcpka-cnt 3",
)

_FORGOTTEN = ("RAY_ADDRESS", "RAY_JOB_ID", "RAY_RAYLET_PID", MARKER_VARIABLE)
"""Variables of another cluster that would lead this one astray."""


def cluster_environment(
    cluster: str,
    temp_dir: Path,
    repository: Path | None,
    *,
    haproxy: bool = True,
    drain_s: float | None = None,
    base: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """What the head node is started with; workers and replicas inherit it.

    A variable that is already set wins over our default, but not over what was asked for in an
    argument.

    Args:
        cluster: The cluster's id.
        temp_dir: Its own folder.
        repository: The model repository, absolute.
        haproxy: Whether HAProxy is the proxy. It comes with `ray[serve]` on Linux only.
        drain_s: How long a replica that is stopped goes on answering; by default Serve's 30 s.
        base: The environment to start from; by default this process's.
    """
    environment = dict(os.environ if base is None else base)
    for name in _FORGOTTEN:
        environment.pop(name, None)
    if not haproxy:
        environment["RAY_SERVE_ENABLE_HA_PROXY"] = "0"
    if drain_s is not None:
        environment["RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"] = f"{drain_s:g}"
    # One node has nowhere to drain to: without this, `down` waits half a minute for nothing.
    environment.setdefault("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "0")
    for name, value in node_variables(temp_dir, haproxy=haproxy).items():
        environment.setdefault(name, value)
    taken: list[int] = []
    for name, default in _PORTS.items():
        if name not in environment:
            taken.append(find_port(default, taken=taken))
            environment[name] = str(taken[-1])
    environment[MARKER_VARIABLE] = cluster
    if repository is not None:
        environment[REPOSITORY_VARIABLE] = str(repository)
    # The folder where a Ray job runs is a copy that is thrown away.
    environment.setdefault(DATA_VARIABLE, str(Path.cwd()))
    environment["PATH"] = search_path(environment)
    return environment


def search_path(environment: Mapping[str, str]) -> str:
    """PATH with `ray`, `serve` and `haproxy` of this installation, activated or not."""
    return os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])


def node_variables(temp_dir: Path, *, haproxy: bool = True) -> dict[str, str]:
    """What Ray has to find in its environment on every node, on one machine or on many.

    Args:
        temp_dir: Ray's folder, `ray start --temp-dir`.
        haproxy: Whether HAProxy is the proxy.
    """
    folder = temp_dir / "h"  # short: HAProxy takes paths of sockets up to 97 characters
    values = {
        # Explicit, or Ray decides by whether some other cluster once left a token behind. Then
        # `serve deploy` from another shell would be refused without the same variables.
        "RAY_AUTH_MODE": "disabled",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        # Old replicas go on when the new ones of a rolling update cannot start.
        "RAY_SERVE_STOP_FAILED_ROLLING_UPDATES": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray runs its workers at the priority of background work (15): on a full machine replicas
        # then wait for everything else on it (docs/decisions/0015).
        "RAY_worker_niceness": "0",
    }
    if haproxy:
        values |= {
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_HAPROXY_NBTHREAD": str(max(1, min(4, (os.cpu_count() or 1) // 2))),
            "RAY_SERVE_HAPROXY_RETRY_ON": "\n    ".join(_RETRY_LINES),
            # As many as connections that fail until a replica counts as down.
            "RAY_SERVE_HAPROXY_RETRIES": "3",
            # Serve's 5 s, three times, are longer than clients wait.
            "RAY_SERVE_HAPROXY_TIMEOUT_CONNECT_S": "2",
            # A new head starts proxies again that do not call themselves ready three times, also
            # where they answer. They wait for the proxy of the head itself.
            "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",
            # Replicas count requests instead of the proxy's manager, to which HAProxy would send a
            # line for each (docs/decisions/0011).
            "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
            # HAProxy writes a line for each request. Where nobody is bound to this socket that
            # costs next to nothing, unlike UDP to port 514, Serve's default (docs/decisions/0016).
            "RAY_SERVE_HAPROXY_LOG_TARGET": f"{folder}/log.sock",
            # Plain inference requests go past Ray's handling of each (docs/decisions/0014).
            "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "rayprism.serving.lane:middlewares",
            # By default these lie in a folder that all users of the machine share.
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy.cfg",
            "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/a.sock",
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{folder}/m.sock",
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/server-state",
        }
    return values
