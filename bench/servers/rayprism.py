"""rayprism itself, as `rayprism up` and an operator's Serve file start it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from bench.cluster import BenchCluster, ClusterFailed
from bench.scenario import Action, RayprismServer
from bench.servers.actions import edits_for
from bench.servers.base import ActionFailed, RunContext, Unavailable, infer_path
from bench.servers.on_ray import RayServer, enough_cpus
from bench.servers.replica_metrics import INTERVAL_S, ReplicaReader
from rayprism.errors import LoadFailed
from rayprism.models.gpu import read_gpu
from rayprism.serving.settings import DEPLOYMENT_NAME

__all__ = ["Rayprism", "applications_of"]

_INTERVAL_VARIABLE = "RAYPRISM_METRICS_INTERVAL_S"
_KILL_S = 60.0
_KILL_POLL_S = 0.05


class Rayprism(RayServer):
    """Version 1 of a model at its own address, and the others beside it.

    Metrics are sent every second instead of every five, so that `reader` need not wait as long.
    """

    server: RayprismServer

    def __init__(self, name: str, server: RayprismServer, run: RunContext) -> None:
        super().__init__(name, server, run)
        self._changed = self._acted = False

    def prepare(self) -> None:
        """Pushes the versions.

        Raises:
            Unavailable: It needs a GPU, and there is none.
        """
        if self.server.num_gpus:
            try:
                read_gpu(0)
            except LoadFailed as error:
                raise Unavailable(str(error)) from None
        # Promotion needs a second one, also where it is not deployed beside the first.
        self.run.push(self.model, max(2, self.server.versions))

    def make_cluster(self) -> BenchCluster:
        """A cluster as `rayprism up` starts it, with gRPC."""
        return BenchCluster(
            self.marker,
            rayprism=True,
            cpus=enough_cpus(_cpus_of(self.server)),
            environment={_INTERVAL_VARIABLE: f"{INTERVAL_S:g}", **self.server.environment},
            grpc=True,
        )

    def applications(self) -> Sequence[Mapping[str, Any]]:
        """As they are deployed first."""
        repository = str(self.run.repository.resolve())
        args = {"repository": repository, **self.model.application_args()}
        if self.server.options:
            args["options"] = self.server.options
        return applications_of(self.server, args)

    def locate(self, cluster: BenchCluster) -> None:
        """The model's own addresses."""
        self.url = cluster.url(infer_path(self.model.name))
        self.metadata_url = cluster.url(f"/v2/models/{self.model.name}")
        self.grpc_address = f"127.0.0.1:{cluster.grpc_port}"
        self.headers = {"application": self.model.name}

    def reset(self) -> None:
        """Deploys the stable version's application as it was first, where it is not so any more."""
        if not self._changed and not self._has_scaled():
            return
        original = self.applications()[0]
        self.cluster.remove([original["name"]], wait=True)
        self.cluster.deploy(original)
        self._changed = False
        self.settle()

    def pause(self) -> None:
        """As of any server on Ray, once the last change is over."""
        if self._acted or self.server.autoscaling is not None:
            self._acted = False
            self.settle()
        super().pause()

    def act(self, action: Action) -> str:
        """Changes the stable version's application, or kills one of its replicas.

        Raises:
            ActionFailed: It did not come to what was asked for.
        """
        self._acted = True
        try:
            if action.do == "kill-replica":
                return self._kill()
            edits = edits_for(action, self.model.name, self.applications()[0])
            self._changed = True
            self.cluster.change(edits)
        except ClusterFailed as error:
            raise ActionFailed(str(error)) from None
        changes = ", ".join(f"{'.'.join(edit.path)} = {_said(edit.value)}" for edit in edits)
        return f"{action.do}: {changes}"

    def reader(self) -> ReplicaReader | None:
        """Reads what the replicas of all versions count together."""
        return ReplicaReader.at(self.cluster.dashboard, self.model.name)

    def facts(self) -> dict[str, Any]:
        """As of any server on Ray, with rayprism's version."""
        facts = super().facts()
        facts["versions"]["rayprism"] = metadata.version("rayprism")
        return facts

    def _has_scaled(self) -> bool:
        autoscaling = self.server.autoscaling
        if autoscaling is None:
            return False
        least = int(autoscaling.get("min_replicas", 1))
        return len(self._replicas()) != int(autoscaling.get("initial_replicas") or least)

    def _kill(self) -> str:
        before = self._replicas()
        running = [pid for pid, state in before.items() if state == "RUNNING"]
        if not running:
            raise ActionFailed(f"no replica of {self.model.name} is running: {before}")
        victim = running[0]
        os.kill(victim, signal.SIGKILL)
        deadline_s = time.monotonic() + _KILL_S
        while True:
            now = self._replicas()
            again = [pid for pid, state in now.items() if state == "RUNNING" and pid != victim]
            if len(again) >= len(running):
                return f"kill-replica: pid {victim} of {len(running)}; all are running again"
            if time.monotonic() > deadline_s:
                raise ActionFailed(f"replica {victim} was not replaced in {_KILL_S:g} s: {now}")
            time.sleep(_KILL_POLL_S)

    def _replicas(self) -> dict[int, str]:
        """States of the stable version's replicas, by process."""
        application = self.cluster.details()["applications"][self.model.name]
        replicas = application["deployments"].get(DEPLOYMENT_NAME, {}).get("replicas", ())
        return {item["pid"]: item["state"] for item in replicas if item.get("pid")}


def applications_of(server: RayprismServer, args: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The applications, as an operator writes them: the stable version's first.

    Args:
        server: Of a scenario.
        args: Of each, beside model and version.
    """
    return [
        {
            "name": server.model if version == 1 else f"{server.model}-{version}",
            "import_path": "rayprism.serving.app:build",
            "route_prefix": f"/v2/models/{server.model}"
            + ("" if version == 1 else f"/versions/{version}"),
            "args": {"model": server.model, "version": version, **args},
            "deployments": [_deployment(server, version)],
        }
        for version in range(1, server.versions + 1)
    ]


def _deployment(server: RayprismServer, version: int) -> dict[str, Any]:
    deployment: dict[str, Any] = {
        "name": DEPLOYMENT_NAME,
        "ray_actor_options": {"num_cpus": server.num_cpus},
    }
    if server.num_gpus:
        deployment["ray_actor_options"]["num_gpus"] = server.num_gpus
    if version > 1:
        return deployment
    if server.autoscaling is None:
        deployment["num_replicas"] = server.replicas
    else:
        deployment["autoscaling_config"] = server.autoscaling
    # Always there: Serve does not tell replicas of a `user_config` that is gone.
    return {**deployment, "user_config": server.user_config}


def _cpus_of(server: RayprismServer) -> float:
    replicas = server.replicas
    if server.autoscaling is not None:
        replicas = int(server.autoscaling.get("max_replicas", 1))
    return server.num_cpus * (replicas + server.versions - 1)


def _said(value: Any) -> str:
    return "none" if not isinstance(value, str | int | Mapping) else str(value)
