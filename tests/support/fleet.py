"""A real local cluster for tests: `rayprism up`, and deployments over Serve's REST API."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from rayprism.fleet.cluster import ClusterState, find_cluster
from rayprism.fleet.processes import find_port
from rayprism.fleet.rest import ServeClient
from rayprism.fleet.waiting import wait_until_running

GRPC_FUNCTION = "rayprism.protocol.grpc:add_GRPCInferenceServiceServicer_to_server"


@dataclass(slots=True)
class Fleet:
    """A cluster that is up, and where it is reached."""

    state: ClusterState
    http_port: int
    grpc_port: int
    haproxy: bool

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def client(self) -> ServeClient:
        return ServeClient(self.state.dashboard_address, timeout_s=60)

    def put(self, applications: list[dict[str, Any]]) -> None:
        """What `serve deploy` sends."""
        config = {
            "proxy_location": "HeadOnly",
            "http_options": {"host": "127.0.0.1", "port": self.http_port},
            "grpc_options": {"port": self.grpc_port, "grpc_servicer_functions": [GRPC_FUNCTION]},
            "applications": applications,
        }
        self.client.put(config)

    def deploy(self, applications: list[dict[str, Any]], timeout_s: float = 120) -> None:
        """Deploys, and waits until everything runs."""
        self.put(applications)
        wait_until_running(self.client, timeout_s=timeout_s)

    def application(self, name: str) -> dict[str, Any]:
        """What Serve says of one application."""
        found: dict[str, Any] = self.client.details()["applications"][name]
        return found

    def replica_pids(self, name: str) -> list[int]:
        """Processes of the running replicas of an application's model."""
        replicas = self.application(name)["deployments"]["model"]["replicas"]
        return sorted(replica["pid"] for replica in replicas if replica["state"] == "RUNNING")


def model_application(
    model: str,
    version: int,
    *,
    name: str | None = None,
    route: str | None = None,
    user_config: dict[str, Any] | None = None,
    replicas: int = 1,
    **args: Any,
) -> dict[str, Any]:
    """An application as one writes it in a Serve YAML, with little CPU."""
    deployment: dict[str, Any] = {
        "name": "model",
        "num_replicas": replicas,
        "ray_actor_options": {"num_cpus": 0.1},
    }
    if user_config is not None:
        deployment["user_config"] = user_config
    return {
        "name": name or model,
        "route_prefix": route or f"/v2/models/{model}",
        "import_path": "rayprism.serving.app:build",
        "args": {"model": model, "version": version, **args},
        "deployments": [deployment],
    }


FRONT_DOOR = {
    "name": "rayprism",
    "route_prefix": "/",
    "import_path": "rayprism.serving.front:build",
}


@contextmanager
def running_fleet(
    repository: Path, state_dir: Path, *, haproxy: bool, drain_s: float = 1.0
) -> Iterator[Fleet]:
    """A cluster on ports of its own, stopped at the end.

    Args:
        repository: Of models.
        state_dir: Where the cluster's state is kept.
        haproxy: Whether HAProxy is the proxy.
        drain_s: How long a replica that is stopped goes on answering.
    """
    command = [str(Path(sys.executable).with_name("rayprism"))]
    options = ["--state", str(state_dir), "--repository", str(repository), "--num-cpus", "8"]
    options += ["--dashboard-port", str(find_port()), "--drain-s", f"{drain_s:g}"]
    if not haproxy:
        options.append("--no-haproxy")
    up = subprocess.run([*command, "up", *options], capture_output=True, text=True, timeout=180)
    assert up.returncode == 0, up.stdout + up.stderr
    state = find_cluster(state_dir)
    assert state is not None
    try:
        yield Fleet(state, find_port(), find_port(), haproxy)
    finally:
        subprocess.run([*command, "down", "--state", str(state_dir)], check=True, timeout=120)


def wait_for(condition: Callable[[], Any], timeout_s: float = 60) -> Any:
    """Polls until a condition holds, and gives what it gave."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s} s: {condition}")
        time.sleep(0.2)


def kill(pid: int) -> None:
    """SIGKILL, as the kernel does when memory runs out."""
    psutil.Process(pid).kill()
