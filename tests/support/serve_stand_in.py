"""A stand-in for Serve's REST API and for the replicas' `/config`: no Ray, no replica, no model.

What it does was read off Ray 2.60: every application of a PUT gets its time and is DEPLOYING at
once; other `args` mean new replicas beside the old ones, which stay until the new ones are ready;
an application that is not in a PUT is deleted. Each GET is one turn of its control loop.
"""

from __future__ import annotations

import copy
import http.server
import itertools
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

MODEL = "rayprism.serving.app:build"


def application(
    model: str,
    version: int | str,
    *,
    name: str | None = None,
    route: str | None = None,
    traffic: Mapping[str, Any] | None = None,
    **args: Any,
) -> dict[str, Any]:
    """An application as one writes it in a Serve file."""
    user_config: dict[str, Any] = {"max_queue_rows": 2048}
    if traffic is not None:
        user_config["traffic"] = dict(traffic)
    return {
        "name": name or model,
        "route_prefix": route or f"/v2/models/{model}",
        "import_path": MODEL,
        "args": {"model": model, "version": version, **args},
        "deployments": [{"name": "model", "num_replicas": 1, "user_config": user_config}],
    }


def beside(model: str, version: int | str, **args: Any) -> dict[str, Any]:
    """The application of a version beside the stable one."""
    route = f"/v2/models/{model}/versions/{version}"
    return application(model, version, name=f"{model}-{version}", route=route, **args)


@dataclass
class _App:
    config: dict[str, Any]
    deployed_s: float
    replicas: dict[str, str] = field(default_factory=dict)
    served: Any = None
    """The `args` of the replicas that run."""
    phases: list[str] = field(default_factory=list)
    status: str = "RUNNING"
    deployment: str | None = "HEALTHY"
    message: str = ""


class ServeStandIn:
    """The state of Serve, and what should go wrong.

    Args:
        applications: Running from the beginning.
    """

    def __init__(self, *applications: Mapping[str, Any]) -> None:
        self.bad_versions: dict[str, str] = {}
        """Versions that cannot start, with the messages of their deployments."""
        self.stuck_versions: dict[str, str] = {}
        """Versions that are never scheduled, with the messages of their deployments."""
        self.draining_versions: set[str] = set()
        """Versions whose replicas never end what they took."""
        self.refusal: tuple[int, str] | None = None
        """What every PUT is answered with."""
        self.user_config_error = ""
        self.on_get: Callable[[], None] = lambda: None
        self.puts: list[dict[str, Any]] = []
        self.port = 0
        self._lock = threading.RLock()
        self._times = itertools.count(1_795_313_696)
        self._ids = itertools.count(1)
        self._apps: dict[str, _App] = {}
        self.put({"applications": [copy.deepcopy(dict(app)) for app in applications]})
        self.settle()
        self.puts.clear()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def config(self, name: str) -> dict[str, Any] | None:
        """What an application was last put as; None where there is no such."""
        app = self._apps.get(name)
        return None if app is None else app.config

    def version(self, name: str) -> Any:
        """What the running replicas of an application serve."""
        return self._apps[name].served["version"]

    def traffic(self, name: str) -> Any:
        """What an application says of traffic."""
        return self._apps[name].config["deployments"][0]["user_config"].get("traffic")

    def set_status(self, name: str, status: str) -> None:
        self._apps[name].status = status

    def replace(self, *applications: Mapping[str, Any]) -> None:
        """Somebody else's `serve deploy`."""
        self.put({"applications": [copy.deepcopy(dict(app)) for app in applications]})

    def settle(self) -> None:
        """Lets everything that was put come into force."""
        for app in self._apps.values():
            while app.phases:
                self._turn(app)

    def put(self, config: Mapping[str, Any]) -> None:
        with self._lock:
            self.puts.append(copy.deepcopy(dict(config)))
            time_s = float(next(self._times))
            wanted = {app["name"]: app for app in config["applications"]}
            for name in [name for name in self._apps if name not in wanted]:
                del self._apps[name]
            for name, item in wanted.items():
                app = self._apps.setdefault(name, _App(item, time_s))
                app.config, app.deployed_s, app.status = item, time_s, "DEPLOYING"
                restarts = item.get("args", {}) != app.served
                app.phases = ["building", "starting", "draining"] if restarts else ["updating"]
                app.phases.append("running")
                self._turn(app)

    def get(self) -> dict[str, Any]:
        with self._lock:
            self.on_get()
            shown = {
                "controller_info": {"node_id": "1"},
                "proxy_location": "HeadOnly",
                "http_options": {"host": "127.0.0.1", "port": self.port, "request_timeout_s": None},
                "grpc_options": {"port": 9000, "grpc_servicer_functions": []},
                "applications": {name: self._shown(name) for name in self._apps},
                "target_capacity": None,
            }
            for app in self._apps.values():
                self._turn(app)
            return copy.deepcopy(shown)

    def _turn(self, app: _App) -> None:
        if not app.phases:
            return
        version = str(app.config.get("args", {}).get("version"))
        phase = app.phases.pop(0)
        if phase == "building":
            app.deployment = None
        elif phase == "updating":
            app.deployment = "UPDATING"
            # Those of a rollout that is taken back.
            app.replicas = {id: state for id, state in app.replicas.items() if state == "RUNNING"}
        elif phase == "starting":
            app.deployment = "UPDATING"
            if version in self.bad_versions:
                app.phases, app.status, app.deployment = [], "DEPLOY_FAILED", "DEPLOY_FAILED"
                app.message = self.bad_versions[version]
                return
            app.replicas[f"r{next(self._ids)}"] = "STARTING"
            if version in self.stuck_versions:
                app.phases, app.message = [], self.stuck_versions[version]
        elif phase == "draining":
            new = [id for id, state in app.replicas.items() if state == "STARTING"]
            app.replicas = {id: "RUNNING" if id in new else "STOPPING" for id in app.replicas}
            was, app.served = app.served, app.config.get("args", {})
            if was and str(was.get("version")) in self.draining_versions:
                app.phases = []
        else:
            app.replicas = {id: "RUNNING" for id, now in app.replicas.items() if now != "STOPPING"}
            app.status, app.deployment, app.message = "RUNNING", "HEALTHY", ""

    def _shown(self, name: str) -> dict[str, Any]:
        app = self._apps[name]
        deployments = {}
        if app.deployment is not None:
            deployments["model"] = {
                "name": "model",
                "status": app.deployment,
                "message": app.message,
                "target_num_replicas": 1,
                "replicas": [
                    {"replica_id": id, "state": state} for id, state in app.replicas.items()
                ],
            }
        return {
            "name": name,
            "route_prefix": app.config.get("route_prefix"),
            "status": app.status,
            "message": "",
            "last_deployed_time_s": app.deployed_s,
            "deployed_app_config": app.config,
            "source": "declarative",
            "deployments": deployments,
        }


@contextmanager
def serving(stand_in: ServeStandIn) -> Iterator[ServeStandIn]:
    """Answers HTTP on a free port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.endswith("/config"):
                said = {"device": {"string_value": "cpu"}}
                if stand_in.user_config_error:
                    said["user_config_error"] = {"string_value": stand_in.user_config_error}
                self._answer(200, json.dumps({"name": "flights", "parameters": said}))
                return
            self._answer(200, json.dumps(stand_in.get()))

        def do_PUT(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if stand_in.refusal is not None:
                self._answer(*stand_in.refusal)
                return
            stand_in.put(json.loads(body))
            self._answer(200, "")

        def _answer(self, status: int, text: str) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *args: Any) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        stand_in.port = server.server_port
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield stand_in
        finally:
            server.shutdown()
            thread.join()
