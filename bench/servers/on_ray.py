"""Servers in a Ray cluster of their own."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import onnxruntime

from bench.cluster import BenchCluster, ClusterFailed
from bench.scenario import RayprismServer, RayServeServer
from bench.servers.base import (
    NeverRight,
    NotOurs,
    Probe,
    RunContext,
    Unavailable,
    model_of,
    set_paused,
)
from bench.servers.meter import Meter

__all__ = ["RayServer", "enough_cpus"]

_FIRST_ANSWER_S = 30.0
_RESUME_S = 60.0
_LEAST_CPUS = 4
_STOP_PASSES = 5
_SETTLED_S = 4.0
"""Seen between two starts of HAProxy that belonged to one change: up to 3 s."""
_LONGEST_SETTLE_S = 30.0
_SETTLE_POLL_S = 0.2


class RayServer(NotOurs, ABC):
    """A server of a scenario whose applications run on Ray Serve.

    Pausing stops every process of the cluster at once and lets all of them go on at once, so that
    their clocks agree. Measured with pauses of 10 to 400 s: the first right answer came within a
    second, most of which it takes to find the processes, and in the minute after it no request
    failed, and no replica or proxy was found unhealthy or replaced.

    But not where HAProxy was just being started anew, as it is for some seconds after each change
    of replicas: its manager takes it for dead after the pause, and for 25 s nothing is answered. So
    after each change it is waited until that has ended, in no measurement.
    """

    grpc_address: str | None = None
    headers: Mapping[str, str] = {}

    def __init__(self, name: str, server: RayprismServer | RayServeServer, run: RunContext) -> None:
        self.name = name
        self.server = server
        self.marker = f"{run.marker}/{name}"
        self.url = self.metadata_url = ""
        self.run = run
        self.model = model_of(server)
        self.probe = Probe(self.model)
        self._cluster: BenchCluster | None = None

    @property
    def cluster(self) -> BenchCluster:
        """Its cluster, once it is started."""
        if self._cluster is None:
            raise RuntimeError(f"{self.name} is not started")
        return self._cluster

    @abstractmethod
    def prepare(self) -> None:
        """Makes what it needs before it starts: not measured."""

    @abstractmethod
    def make_cluster(self) -> BenchCluster:
        """A cluster that is not started."""

    @abstractmethod
    def applications(self) -> Sequence[Mapping[str, Any]]:
        """What is deployed; the first one is what is asked."""

    @abstractmethod
    def locate(self, cluster: BenchCluster) -> None:
        """Sets `url` and the other addresses."""

    def start(self) -> dict[str, float]:
        """Starts the cluster, deploys, and asks until the first right answer.

        Returns:
            `cluster_s`, `deploy_s`, `first_answer_s`, and `ready_s` in all.

        Raises:
            Unavailable: One of these failed.
        """
        self.prepare()
        began_s = time.monotonic()
        try:
            self._cluster = self.make_cluster()
            self._cluster.__enter__()
            cluster_s = time.monotonic()
            self.locate(self._cluster)
            self._cluster.deploy(*self.applications())
            deployed_s = time.monotonic()
            self.probe.wait(self.url, _FIRST_ANSWER_S)
        except (ClusterFailed, NeverRight) as error:
            self.stop()
            raise Unavailable(str(error)) from None
        ready_s = time.monotonic()
        self.settle()
        return {
            "cluster_s": cluster_s - began_s,
            "deploy_s": deployed_s - cluster_s,
            "first_answer_s": ready_s - deployed_s,
            "ready_s": ready_s - began_s,
        }

    def restart_model(self) -> float:
        """Takes the first application away, and deploys it again in the running cluster."""
        application = self.applications()[0]
        self.cluster.remove([application["name"]], wait=True)
        began_s = time.monotonic()
        self.cluster.deploy(application)
        self.probe.wait(self.url, _FIRST_ANSWER_S)
        took_s = time.monotonic() - began_s
        self.settle()
        return took_s

    def pause(self) -> None:
        """Stops all processes of the cluster where they are."""
        stopped: set[int] = set()
        for _ in range(_STOP_PASSES):
            # One of them may just have started another one.
            fresh = [item for item in self.cluster.processes() if item.pid not in stopped]
            if not fresh:
                return
            set_paused(fresh, True)
            stopped.update(item.pid for item in fresh)

    def resume(self) -> None:
        """Lets them go on, takes back what actions changed, and waits for a right answer."""
        set_paused(self.cluster.processes(), False)
        self.reset()
        self.probe.wait(self.url, _RESUME_S)

    @abstractmethod
    def reset(self) -> None:
        """Takes back what actions changed."""

    def settle(self) -> None:
        """Waits until HAProxy has not been started anew for some seconds."""
        deadline_s = time.monotonic() + _LONGEST_SETTLE_S
        since_s, proxies = time.monotonic(), self.cluster.haproxies()
        while time.monotonic() < min(since_s + _SETTLED_S, deadline_s):
            time.sleep(_SETTLE_POLL_S)
            if (now := self.cluster.haproxies()) != proxies:
                since_s, proxies = time.monotonic(), now

    def meter(self) -> Meter:
        """A meter with the roles replica, proxy, ray and load."""
        return Meter(self.marker, rest="ray")

    def facts(self) -> dict[str, Any]:
        """Versions, the environment that was asked for, and the applications."""
        return {
            "model": self.model.name,
            "versions": {"ray": metadata.version("ray"), "onnxruntime": onnxruntime.__version__},
            "environment": dict(self.server.environment),
            "applications": [_shown(item) for item in self.applications()],
        }

    def stop(self) -> None:
        """Ends the cluster."""
        cluster, self._cluster = self._cluster, None
        if cluster is not None:
            # What is stopped cannot end in order.
            set_paused(cluster.processes(), False)
            cluster.stop()


def _shown(application: Mapping[str, Any]) -> dict[str, Any]:
    """Without folders of this machine."""
    folders = ("repository", "model_file", "tokenizer")
    args = {key: value for key, value in application["args"].items() if key not in folders}
    return {**application, "args": args}


def enough_cpus(wanted: float) -> int:
    """Logical CPUs of a cluster: twice what replicas take, since new ones start beside old ones."""
    return max(_LEAST_CPUS, round(2 * wanted + 0.5))
