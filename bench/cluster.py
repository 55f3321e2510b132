"""Ray clusters of a benchmark's own: started beside others, and gone afterwards."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from bench.processes import MARKER, end_marked, marked
from rayprism.fleet.edits import Edit, apply_edits
from rayprism.fleet.environment import cluster_environment
from rayprism.fleet.processes import end_processes, find_members
from rayprism.fleet.rollout import Mark, describe_progress, has_failed, is_ready

__all__ = [
    "BenchCluster",
    "ClusterFailed",
    "clean_environment",
    "free_ports",
]

_ROOT = Path(__file__).resolve().parent.parent
_START_TIMEOUT_S = 90.0
_GRPC_SERVICE = "rayprism.protocol.grpc:add_GRPCInferenceServiceServicer_to_server"
_DRAIN_S = 1.0
"""Replicas that are taken away have nothing to finish: no use in waiting Serve's half minute."""
_REPLICA_PORTS, _SLOTS = 50, 32
"""So many ports for the replicas of each cluster, and so many clusters beside each other."""
_FIRST_HTTP, _FIRST_GRPC = 31_100, 21_100
"""Below what Linux gives to clients' connections (32768 to 60999), and beside what clusters take
that were started otherwise (30000 to 31000; workers 10002 to 19999)."""
_FREE_PORTS = range(_FIRST_GRPC + _SLOTS * _REPLICA_PORTS, 30_000)
_given: set[int] = set()


class ClusterFailed(Exception):
    """A cluster did not start, or an application on it did not."""


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on just now; none is given twice.

    They are none that Linux gives to clients' connections: what is given here is taken only a while
    later, and a benchmark opens many connections.
    """
    found: list[int] = []
    for port in random.sample(_FREE_PORTS, len(_FREE_PORTS)):
        if len(found) == count:
            break
        if port not in _given and _is_free(port):
            found.append(port)
    if len(found) < count:
        raise ClusterFailed(f"there are no {count} free ports from {_FREE_PORTS[0]} on")
    _given.update(found)
    return found


def clean_environment(marker: str) -> dict[str, str]:
    """The environment of a process of the run: nothing of any other cluster is in it."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("RAY_", "RAYPRISM_", "SERVE_"))
        # Where set, every start would compile our own sources anew, as no installation does.
        and name != "PYTHONDONTWRITEBYTECODE"
    }
    paths = [str(_ROOT), *filter(None, [kept.get("PYTHONPATH")])]
    return {
        **kept,
        MARKER: marker,
        "PYTHONPATH": os.pathsep.join(paths),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", "")]),
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def _ports_of_its_own() -> dict[str, str]:
    """So that the cluster may stand beside others; nothing here changes its speed."""
    metrics, stats, http, grpc = free_ports(4)
    first_http, first_grpc = _replica_ports()
    return {
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(http),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(grpc),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first_http),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first_http + _REPLICA_PORTS - 1),
        "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(first_grpc),
        "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(first_grpc + _REPLICA_PORTS - 1),
    }


_slots = itertools.count()


def _replica_ports() -> tuple[int, int]:
    """The first of the ports for HTTP and for gRPC; none of them is in use.

    Replicas listen with SO_REUSEPORT: those of two clusters on one port would share its requests.
    """
    for _ in range(_SLOTS):
        offset = next(_slots) % _SLOTS * _REPLICA_PORTS
        firsts = _FIRST_HTTP + offset, _FIRST_GRPC + offset
        if all(_is_free(first + port) for first in firsts for port in range(_REPLICA_PORTS)):
            return firsts
    raise ClusterFailed(
        f"no {_REPLICA_PORTS} free ports in a row from {_FIRST_HTTP} and {_FIRST_GRPC} on. Mend: "
        "end what an earlier run left behind (`ss -ltnp` shows it)"
    )


def _is_free(port: int) -> bool:
    with socket.socket() as probe, contextlib.suppress(OSError):
        probe.bind(("0.0.0.0", port))
        return True
    return False


class BenchCluster:
    """A single-node Ray cluster with Serve on it, as a context manager.

    Args:
        marker: Of the run; see `bench.processes`.
        rayprism: Whether its environment is what `rayprism up` sets, or Ray's defaults.
        cpus: Logical ones, which bound how many replicas there may be, not how fast they are.
        environment: Beside it, and instead of what `rayprism up` would set by itself.
        grpc: Whether its proxy takes the Open Inference Protocol's gRPC, too.
    """

    def __init__(
        self,
        marker: str,
        *,
        rayprism: bool,
        cpus: int = 4,
        environment: Mapping[str, str] | None = None,
        grpc: bool = False,
    ) -> None:
        self._marker = marker
        self._rayprism = rayprism
        self._cpus = cpus
        self._environment = dict(environment or {})
        # Short: sockets in it may have no more than 107 characters.
        self._folder = Path(tempfile.mkdtemp(prefix="rpb-"))
        self._process: subprocess.Popen[bytes] | None = None
        gcs, dashboard, agent, agent_grpc, http, grpc_port = free_ports(6)
        self._ports = {
            "port": gcs,
            "dashboard-port": dashboard,
            "dashboard-agent-listen-port": agent,
            "dashboard-agent-grpc-port": agent_grpc,
        }
        self.http_port = http
        self.grpc_port = grpc_port if grpc else None
        self.dashboard = f"http://127.0.0.1:{dashboard}"
        self._api = f"{self.dashboard}/api/serve/applications/"
        self._applications: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def url(self, path: str) -> str:
        """Address of a path behind the cluster's proxy."""
        return f"http://127.0.0.1:{self.http_port}{path}"

    def _variables(self) -> dict[str, str]:
        environment = clean_environment(self._marker) | self._environment
        if not self._rayprism:
            return environment
        environment = _ports_of_its_own() | environment
        return cluster_environment(
            self._marker, self._folder, None, drain_s=_DRAIN_S, base=environment
        )

    def _start(self) -> None:
        command = [
            *(str(Path(sys.executable).parent / "ray"), "start", "--head", "--block"),
            # Ray takes this loopback address as it is, and 127.0.0.1 as that of the network.
            "--node-ip-address=127.0.0.2",
            f"--num-cpus={self._cpus}",
            "--object-store-memory=200000000",
            f"--temp-dir={self._folder}",
            *(f"--{name}={value}" for name, value in self._ports.items()),
        ]
        log = self._folder / "ray-start.log"
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                env=self._variables(),
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                # Ctrl-C is the benchmark's: it ends the cluster in order.
                start_new_session=True,
            )
        deadline = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise ClusterFailed(f"ray start ended: {log.read_text()[-2000:]}")
            try:
                self.details()
                return
            except (OSError, ValueError):
                time.sleep(0.25)
        raise ClusterFailed(f"no answer from {self._api} within {_START_TIMEOUT_S:.0f} s")

    def details(self) -> dict[str, Any]:
        """What Serve says of itself and its applications."""
        with urllib.request.urlopen(self._api, timeout=10) as answer:
            details: dict[str, Any] = json.load(answer)
        return details

    def deploy(self, *applications: Mapping[str, Any], timeout_s: float = 120.0) -> None:
        """Adds applications, or changes those of the same name, and waits until they run.

        Raises:
            ClusterFailed: One of them cannot start, or not in time.
        """
        for application in applications:
            self._applications[application["name"]] = deepcopy(dict(application))
        self._put()
        self._wait([application["name"] for application in applications], timeout_s)

    def change(self, edits: Sequence[Edit], *, timeout_s: float = 120.0) -> None:
        """Changes applications that run, and waits until nothing is left of before.

        Raises:
            ClusterFailed: One of them cannot become so, or not in time.
        """
        config = {"applications": list(self._applications.values())}
        apply_edits(config, edits)
        self._applications = {item["name"]: item for item in config["applications"]}
        details = self.details()
        names = list(dict.fromkeys(edit.application for edit in edits))
        marks = {name: Mark.of(details, name, edits) for name in names}
        self._put()
        deadline = time.monotonic() + timeout_s
        while True:
            details = self.details()
            if all(is_ready(details, name, mark) for name, mark in marks.items()):
                return
            for name, mark in marks.items():
                if why := has_failed(details, name, mark):
                    raise ClusterFailed(why)
                if time.monotonic() > deadline:
                    progress = describe_progress(details, name, mark, reason=True)
                    raise ClusterFailed(f"not so after {timeout_s:.0f} s: {progress}")
            time.sleep(0.05)

    def application(self, name: str) -> dict[str, Any]:
        """What was deployed under a name, with what has been changed since. A copy."""
        return deepcopy(self._applications[name])

    def remove(self, names: Sequence[str], *, wait: bool = False) -> None:
        """Takes applications away, and waits until their replicas are gone if asked to."""
        for name in names:
            self._applications.pop(name, None)
        self._put()
        deadline = time.monotonic() + 60.0
        while wait and set(names) & set(self.details()["applications"]):
            if time.monotonic() > deadline:
                raise ClusterFailed(f"still there after a minute: {', '.join(names)}")
            time.sleep(0.1)

    def _put(self) -> None:
        config: dict[str, Any] = {
            "proxy_location": "HeadOnly",
            "http_options": {"host": "127.0.0.1", "port": self.http_port},
            "applications": list(self._applications.values()),
        }
        if self.grpc_port is not None:
            config["grpc_options"] = {
                "port": self.grpc_port,
                "grpc_servicer_functions": [_GRPC_SERVICE],
            }
        request = urllib.request.Request(
            self._api,
            data=json.dumps(config).encode(),
            headers={"Content-Type": "application/json"},
            method="PUT",
        )
        try:
            with urllib.request.urlopen(request, timeout=60):
                pass
        except urllib.error.HTTPError as error:
            raise ClusterFailed(f"Serve refused the config: {error.read().decode()}") from None

    def _wait(self, names: Sequence[str], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            states = self.details()["applications"]
            waiting = []
            for name in names:
                state = states.get(name, {"status": "absent"})
                if state["status"] in ("DEPLOY_FAILED", "UNHEALTHY"):
                    raise ClusterFailed(f"{name} is {state['status']}: {_why(state)}")
                if state["status"] != "RUNNING":
                    waiting.append(f"{name} ({state['status']}: {_why(state)})")
            if not waiting:
                return
            if time.monotonic() > deadline:
                raise ClusterFailed(f"not running after {timeout_s:.0f} s: {', '.join(waiting)}")
            time.sleep(0.05)

    def processes(self) -> list[psutil.Process]:
        """Every living process of the cluster."""
        # Some of Ray's processes write their title over their environment, and the mark with it.
        found = [*marked(self._marker), *find_members(self._marker, self._folder)]
        return list({process.pid: process for process in found}.values())

    def haproxies(self) -> frozenset[int]:
        """The processes of HAProxy: Serve starts another one for each change of replicas."""
        found = set()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.name() == "haproxy" and process.environ().get(MARKER) == self._marker:
                    found.add(process.pid)
        return frozenset(found)

    def stop(self) -> None:
        """Ends every process of the run, and removes the cluster's files."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        end_marked(self._marker)
        # Some of Ray's processes write their title over their environment, and the mark with it.
        end_processes(self._marker, self._folder)
        shutil.rmtree(self._folder, ignore_errors=True)


def _why(state: Mapping[str, Any]) -> str:
    deployments = state.get("deployments", {}).values()
    messages = [state.get("message"), *(item.get("message") for item in deployments)]
    return "; ".join(message for message in messages if message)
