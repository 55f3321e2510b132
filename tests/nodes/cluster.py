"""A Ray cluster on several machines, started by the very commands of cluster.yaml."""

from __future__ import annotations

import json
import os
import secrets
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from rayprism.fleet.rest import ServeClient
from rayprism.fleet.waiting import wait_until_running
from tests.nodes.machines import Machine
from tests.support.fleet import FRONT_DOOR, GRPC_FUNCTION, model_application, wait_for

__all__ = ["Cluster", "cluster_file", "tiny"]

_ROOT = Path(__file__).resolve().parents[2]
_MODELS = "/mnt/models"
"""Where cluster.yaml mounts the repository."""


def cluster_file(name: str = "cluster.yaml") -> dict[str, Any]:
    """A file for `ray up`."""
    found: dict[str, Any] = yaml.safe_load((_ROOT / name).read_text())
    return found


class Cluster:
    """A head and workers, each on a machine of its own.

    Args:
        folder: For the machines' files.
        models: The model repository.
        mounts: Folders that every machine sees besides, by the path at which it does.
        environment: Variables that all nodes get besides.
    """

    def __init__(
        self,
        folder: Path,
        models: Path,
        mounts: Mapping[str, Path] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._folder = folder
        self._models = models
        self._mounts = dict(mounts or {})
        self._file = cluster_file()
        # Two cores carry all of these machines.
        self._environment = {"RAY_SERVE_HAPROXY_NBTHREAD": "1"} | dict(environment or {})
        self._token = folder / "auth_token"
        self._token.write_text(secrets.token_hex(32))
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(self._token)
        self.machines: dict[int, Machine] = {}

    @property
    def head(self) -> Machine:
        return self.machines[1]

    @property
    def workers(self) -> list[Machine]:
        """Those that were started, in their order, killed ones among them."""
        return [machine for number, machine in sorted(self.machines.items()) if number > 1]

    @property
    def client(self) -> ServeClient:
        return ServeClient(f"http://{self.head.address}:8265", timeout_s=60)

    def add_machine(self, number: int) -> Machine:
        """A machine that has what cluster.yaml puts on it."""
        machine = Machine(
            number,
            self._folder / f"{number}-{secrets.token_hex(2)}",
            mounts={_MODELS: self._models, **self._mounts},
            home={
                "venv": Path(sys.prefix),
                ".ray/auth_token": self._token,
            },
        )
        (sysctl,) = [line for line in self._file["setup_commands"] if "sysctl" in line]
        machine.run(sysctl.removeprefix("sudo "))
        self.machines[number] = machine
        return machine

    def start_head(self, autoscaling: Mapping[str, Any] | None = None, **variables: str) -> Machine:
        """Starts the head, also once more after it was lost.

        Args:
            autoscaling: What `ray up` gives to the autoscaler; by default there is none.
            **variables: Of its environment.
        """
        machine = self.add_machine(1)
        flag = "--autoscaling-config=~/ray_bootstrap_config.yaml"
        command = self._start_command("head_start_ray_commands")
        assert flag in command
        if autoscaling is None:
            command = command.replace(flag, "")
        else:
            machine.write("ray_bootstrap_config.yaml", json.dumps(autoscaling))
        # The dashboard is asked from outside, without a tunnel.
        self._run(machine, f"{command} --num-cpus=0 --dashboard-host=0.0.0.0", variables)
        wait_for(self._answers, 90)
        return machine

    def start_worker(self, number: int, *, cpus: float = 2, **variables: str) -> Machine:
        """Starts a worker that joins the head."""
        machine = self.add_machine(number)
        command = self._start_command("worker_start_ray_commands")
        variables["RAY_HEAD_IP"] = self.head.address
        self._run(machine, f"{command} --num-cpus={cpus:g}", variables)
        return machine

    def _start_command(self, key: str) -> str:
        stop, start = self._file[key]
        assert stop.endswith("ray stop")
        return str(start)

    def _run(self, machine: Machine, command: str, variables: Mapping[str, str]) -> None:
        given = {**self._environment, **variables}
        exports = [f"export {name}={shlex.quote(value)};" for name, value in given.items()]
        script = " ".join([*exports, command, "--object-store-memory=100000000"])
        machine.run(script, timeout_s=180)

    def _answers(self) -> bool:
        try:
            self.client.state()
        except Exception:
            return False
        return True

    def put(self, applications: list[dict[str, Any]]) -> None:
        """What `serve deploy` sends."""
        config = {
            "proxy_location": "EveryNode",
            "http_options": {"host": "0.0.0.0", "port": 8000, "keep_alive_timeout_s": 20},
            "grpc_options": {"port": 9000, "grpc_servicer_functions": [GRPC_FUNCTION]},
            "applications": [FRONT_DOOR, *applications],
        }
        self.client.put(config)

    def deploy(self, applications: list[dict[str, Any]], timeout_s: float = 150) -> None:
        """Deploys, and waits until everything runs."""
        self.put(applications)
        wait_until_running(self.client, timeout_s=timeout_s)

    def replicas(self, application: str = "tiny") -> dict[str, str]:
        """Addresses of the nodes of running replicas, by replica."""
        details = self.client.details()["applications"][application]
        return {
            replica["replica_id"]: replica["node_ip"]
            for replica in details["deployments"]["model"]["replicas"]
            if replica["state"] == "RUNNING"
        }

    def proxies(self) -> dict[str, str]:
        """What Serve says of each proxy, by the node's address."""
        proxies = self.client.details()["proxies"].values()
        return {proxy["node_ip"]: proxy["status"] for proxy in proxies}

    def is_whole(self, replicas: int, *, without: Machine | None = None) -> bool:
        """So many replicas, each on a node of its own, and proxies there and on the head.

        Args:
            replicas: How many there should be.
            without: A machine on which there should be none.
        """
        addresses = set(self.replicas().values())
        proxies = self.proxies()
        return (
            len(addresses) == replicas
            and (without is None or without.address not in addresses)
            and all(proxies.get(at) == "HEALTHY" for at in {*addresses, self.head.address})
        )

    def ray(self, script: str, timeout_s: float = 60) -> str:
        """Runs a command of Ray's on the head."""
        command = f"RAY_AUTH_MODE=token ~/venv/bin/{script}"
        return self.head.run(command, timeout_s=timeout_s)

    def nodes(self) -> dict[str, str]:
        """Ids of Ray's living nodes, by address."""
        text = self.ray("ray list nodes --format=json --limit=1000 --filter state=ALIVE")
        return {node["node_ip"]: node["node_id"] for node in json.loads(text)}

    def wait(self, condition: Callable[[], Any], timeout_s: float = 90) -> Any:
        """Polls until a condition holds; while the head is away it does not."""

        def holds() -> Any:
            try:
                return condition()
            except Exception:
                return None

        return wait_for(holds, timeout_s)

    def stop(self) -> None:
        """Ends all machines."""
        for machine in self.machines.values():
            machine.kill()


def tiny(replicas: int | None = 2, *, each: float = 0.5, **deployment: Any) -> dict[str, Any]:
    """The application of the model `tiny`, one replica a node at most; None: autoscaled."""
    application = model_application("tiny", 1, replicas=replicas or 1)
    if replicas is None:
        del application["deployments"][0]["num_replicas"]
    application["deployments"][0] |= {
        "max_replicas_per_node": 1,
        "ray_actor_options": {"num_cpus": each},
        **deployment,
    }
    return application
