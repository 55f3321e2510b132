"""A cluster's metrics as HTTP shows them: a dashboard that knows nodes, and the nodes' pages.

Pages are made as Ray's agent makes them: of the differences that a `Recorder` hands over, added up
over processes, with the labels that OpenTelemetry and Ray add.
"""

from __future__ import annotations

import http.server
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from rayprism.telemetry.catalogue import EXPORT_PREFIX
from rayprism.telemetry.recorder import Labels, Recorder

__all__ = ["Agent", "Cluster", "Replica", "serving_pages", "unused_address"]

_SCOPE = (
    ("otel_scope_name", "ray._private.telemetry.open_telemetry_metric_recorder"),
    ("otel_scope_schema_url", ""),
    ("otel_scope_version", ""),
)
_SESSION = (("SessionName", "session_1"), ("Version", "2.60.0"))


class Agent:
    """The metrics agent of one node."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, Labels], float] = {}
        self._gauges: dict[str, dict[tuple[str, Labels], float]] = {}
        self.set_node()

    def take(self, process: str, recorder: Recorder) -> None:
        """What a process sends every 5 s."""
        gauges = self._gauges[process] = {}
        for point in recorder.take():
            key = (EXPORT_PREFIX + point.name, point.labels)
            if point.kind == "gauge":
                gauges[key] = point.value
            else:
                self._sums[key] = self._sums.get(key, 0.0) + point.value

    def forget(self, process: str) -> None:
        """The process has ended; its gauges are gone 20 s later."""
        self._gauges.pop(process, None)

    def restart(self) -> None:
        """Forgets all counters."""
        self._sums.clear()

    def set_node(self, cpu_percent: float = 10.0, memory_bytes: float = 2.0 * 2**30) -> None:
        """What Ray says of the node."""
        labels = (("IsHeadNode", "true"), *_SESSION, ("ip", "127.0.0.1"))
        self._gauges["ray node"] = {
            ("ray_node_cpu_utilization", labels): cpu_percent,
            ("ray_node_cpu_count", labels): 2.0,
            ("ray_node_mem_used", labels): memory_bytes,
            ("ray_node_mem_total", labels): 16.0 * 2**30,
        }

    def set_application(
        self, name: str, status: int = 6, *, target: int = 1, healthy: int = 1
    ) -> None:
        """What Serve's controller says of an application; on the node where it runs."""
        worker = (("Component", "core_worker"), *_SESSION, ("WorkerId", "7011a3961b"))
        app = (*worker, ("application", name))
        model = (*app, ("deployment", "model"))
        gauges = {("ray_serve_application_status", app): float(status)}
        gauges["ray_serve_autoscaling_target_replicas", model] = float(target)
        for number in range(target):
            labels = (*model, ("replica", f"{name}-{number}"))
            gauges["ray_serve_deployment_replica_healthy", labels] = float(number < healthy)
        self._gauges[f"application {name}"] = gauges

    def remove_application(self, name: str) -> None:
        del self._gauges[f"application {name}"]

    def page(self) -> bytes:
        """In Prometheus' text format, with much that nobody asked for."""
        series = dict(self._sums)
        for gauges in self._gauges.values():
            series |= gauges
        by_name: dict[str, list[str]] = {}
        for (name, labels), value in series.items():
            shown = ",".join(f'{key}="{_escape(text)}"' for key, text in (*labels, *_SCOPE))
            by_name.setdefault(name, []).append(f"{name}{{{shown}}} {value!r}")
        lines = [f'ray_operation_count{{Name="raylet {number}"}} 1.0' for number in range(300)]
        for name, found in by_name.items():
            lines += [f"# HELP {name} Of rayprism", f"# TYPE {name} gauge", *found]
        return ("\n".join(lines) + "\n").encode()


def _escape(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


class Replica:
    """What one replica of a model records.

    Args:
        agent: Of its node.
        version: That it serves.
        name: Its id.
        application: That it belongs to.
    """

    def __init__(
        self,
        agent: Agent,
        version: str,
        *,
        name: str = "a",
        application: str = "flights",
        role: str = "stable",
        weights: dict[str, float] | None = None,
    ) -> None:
        self._agent, self._name = agent, f"replica {name} of {application}"
        self.recorder = Recorder(model="flights", version=version, replica=name)
        self.queue_rows = 0.0
        self.queue_age_s = 0.0
        self._gauge("replica_info", 1.0, application=application, role=role)
        self.recorder.gauge("rayprism_queue_rows", lambda: self.queue_rows)
        self.recorder.gauge("rayprism_queue_age_seconds", lambda: self.queue_age_s)
        for other, weight in (weights or {}).items():
            self.recorder.gauge(
                "rayprism_traffic_weight_ratio", lambda weight=weight: weight, version=other
            )
        self.serve(0)

    def _gauge(self, name: str, value: float, **labels: str) -> None:
        labels |= {"runtime": "onnx", "device": "cpu"}
        self.recorder.gauge(f"rayprism_{name}", lambda: value, **labels)

    def target_p99(self, seconds: float) -> None:
        """Promises something."""
        self.recorder.gauge("rayprism_target_p99_seconds", lambda: seconds)

    def serve(
        self, requests: int, seconds: float = 0.01, *, outcome: str = "ok", reason: str = "ok"
    ) -> None:
        """Answers clients: two rows each, four requests a batch, a third of it padding."""
        labels = {"protocol": "http", "source": "client", "outcome": outcome, "reason": reason}
        self.recorder.count("rayprism_requests_total", **labels).add(requests)
        if outcome != "ok":
            return
        for _ in range(requests):
            self.recorder.histogram("rayprism_request_seconds").observe(seconds)
            for stage, share in (("decode", 0.1), ("queue", 0.3), ("compute", 0.5)):
                self.recorder.histogram(f"rayprism_{stage}_seconds").observe(share * seconds)
        self.recorder.count("rayprism_rows_total").add(2 * requests)
        for _ in range(requests // 4):
            self.recorder.histogram("rayprism_batch_rows").observe(8)
        self.recorder.count("rayprism_batch_cost_total").add(3 * requests)
        self.recorder.count("rayprism_batch_padding_total").add(requests)

    def send(self) -> None:
        """To the agent, as every 5 s."""
        self._agent.take(self._name, self.recorder)

    def end(self) -> None:
        """And is forgotten."""
        self._agent.forget(self._name)


def unused_address() -> str:
    """Where nobody answers."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return f"127.0.0.1:{found.getsockname()[1]}"


class Cluster:
    """A dashboard and the pages of its nodes.

    Args:
        agents: One for each node.
    """

    def __init__(self, *agents: Agent) -> None:
        self.agents = agents
        self.on_page: Callable[[int], None] = lambda turn: None
        """Is called before each round of pages, counted from 1."""
        self.turns = 0
        self.headers: dict[str, str] = {}
        self.node_headers: list[dict[str, str]] = [{} for _ in agents]
        self.sd_reply: tuple[int, bytes] | None = None
        self.address = ""
        self.targets: list[str] = []

    def discovery(self) -> tuple[int, bytes]:
        self.turns += 1
        self.on_page(self.turns)
        if self.sd_reply is not None:
            return self.sd_reply
        return 200, json.dumps([{"labels": {"job": "ray"}, "targets": self.targets}]).encode()


@contextmanager
def _answering(reply: Callable[[str], tuple[int, bytes]], headers: dict[str, str]) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            headers.update(self.headers)
            status, body = reply(self.path)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def serving_pages(cluster: Cluster) -> Iterator[Cluster]:
    """Answers HTTP on free ports: the dashboard, each node, and one page with nothing of ours."""
    with ExitStack() as stack:
        dashboard = stack.enter_context(
            _answering(
                lambda path: cluster.discovery() if path == "/api/prometheus/sd" else (404, b""),
                cluster.headers,
            )
        )
        cluster.address = f"http://{dashboard}"
        for agent, headers in zip(cluster.agents, cluster.node_headers, strict=True):
            cluster.targets.append(stack.enter_context(_answering(_page_of(agent), headers)))
        other = b"# TYPE autoscaler_active_nodes gauge\nautoscaler_active_nodes 1.0\n"
        cluster.targets.append(stack.enter_context(_answering(lambda path: (200, other), {})))
        yield cluster


def _page_of(agent: Agent) -> Callable[[str], tuple[int, bytes]]:
    return lambda path: (200, agent.page()) if path == "/metrics" else (404, b"")
