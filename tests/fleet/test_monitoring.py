"""`rayprism monitoring` with the real Prometheus and Alertmanager, and something else than Ray."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from click.testing import CliRunner

from rayprism.cli.main import cli
from rayprism.fleet.monitoring import MONITORING_VARIABLE, MonitoringState
from rayprism.fleet.processes import MARKER_VARIABLE, find_members, find_port
from rayprism.fleet.state import ClusterSettings, ClusterState, Home

PROMETHEUS = shutil.which("prometheus")
ALERTMANAGER = shutil.which("prometheus-alertmanager") or shutil.which("alertmanager")
needs_programs = pytest.mark.skipif(
    PROMETHEUS is None or ALERTMANAGER is None,
    reason="prometheus or prometheus-alertmanager is not installed",
)

START = """
import sys
from pathlib import Path
from rayprism.fleet.monitoring import MonitoringSettings, start_monitoring
settings = MonitoringSettings(int(sys.argv[2]), int(sys.argv[3]), scrape_interval_s=1, scale=0.01)
state, fresh = start_monitoring(settings, Path(sys.argv[1]), say=print)
print("fresh" if fresh else "old")
"""


@dataclass
class Node:
    """Answers as a dashboard, as a node's metrics agent, or as HAProxy."""

    port: int = 0
    targets: list[str] = field(default_factory=list)
    metrics: str = 'ray_rayprism_rows_total{model="flights",version="1"} 3\n'
    asked: dict[str, str | None] = field(default_factory=dict)
    """Paths, with the header `Authorization`."""


@contextmanager
def serving(node: Node) -> Iterator[Node]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            node.asked[self.path] = self.headers["Authorization"]
            self.send_response(200)
            if self.path == "/api/prometheus/sd":
                self.send_header("Content-Type", "application/json")
                body = json.dumps([{"labels": {"job": "ray"}, "targets": node.targets}])
            else:
                self.send_header("Content-Type", "text/plain; version=0.0.4")
                body = node.metrics
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *args: Any) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        node.port = server.server_port
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield node
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def cluster(state_dir: Path, dashboard_port: int, haproxy_port: int = 1) -> Iterator[Home]:
    """What `rayprism up` leaves: a state file, and a process with the cluster's marker."""
    home = Home(state_dir.resolve())
    home.state_dir.mkdir(parents=True, exist_ok=True)
    head = subprocess.Popen(
        [sys.executable, "-c", "print('up', flush=True); input()"],
        env=os.environ | {MARKER_VARIABLE: home.id},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert head.stdout is not None
    assert head.stdout.readline() == "up\n"
    ClusterState(
        id=home.id,
        pid=head.pid,
        started="2026-01-02T03:04:05+00:00",
        dashboard_address=f"http://127.0.0.1:{dashboard_port}",
        ray_address="127.0.0.2:1",
        temp_dir=str(home.temp_dir),
        log=str(home.log),
        settings=ClusterSettings(dashboard_port=dashboard_port),
        ports={"haproxy_metrics": haproxy_port},
        versions={},
    ).write(home.state_file)
    try:
        yield home
    finally:
        head.kill()
        head.communicate()


def run(*arguments: str, **environment: str) -> str:
    """A command, whose stdout and stderr are both of interest."""
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, MARKER_VARIABLE: "of another cluster", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def start(state_dir: Path, *ports: int, **environment: str) -> tuple[str, MonitoringState]:
    wanted = ports or (find_port(), find_port())
    said = run("-c", START, str(state_dir), *map(str, wanted), **environment)
    state = MonitoringState.read(state_dir / "monitoring" / "monitoring.json")
    assert state is not None
    return said, state


def command(name: str, state_dir: Path) -> str:
    return run("-m", "rayprism.cli.main", "monitoring", name, "--state", str(state_dir))


@pytest.fixture
def state_dir(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "state"
    for process in psutil.process_iter():
        try:
            mine = process.environ().get(MONITORING_VARIABLE) == marker(tmp_path / "state")
        except psutil.Error:
            continue
        if mine:
            process.kill()


def marker(state_dir: Path) -> str:
    return Home(state_dir.resolve() / "monitoring").id


def wait_for(look: Callable[[], Any], wanted: Any, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while (got := look()) != wanted:
        assert time.monotonic() < deadline, got
        time.sleep(0.1)


def ask(address: str, path: str) -> Any:
    with httpx.Client(trust_env=False) as client:
        return client.get(address + path).raise_for_status().json()


def targets(state: MonitoringState) -> dict[tuple[str, str, str], str]:
    found = ask(state.prometheus_address, "/api/v1/targets")["data"]["activeTargets"]
    return {
        (item["labels"]["job"], item["labels"]["instance"], item["labels"]["cluster"]): item[
            "health"
        ]
        for item in found
    }


@needs_programs
def test_up_watches_the_cluster_and_down_ends_it(state_dir):
    with serving(Node()) as agent, serving(Node()) as haproxy, serving(Node()) as dashboard:
        # Ray lists two ports of the node; HAProxy has one.
        agents = [f"127.0.0.1:{agent.port}", f"127.0.0.1:{dashboard.port}"]
        dashboard.targets = agents
        expected = {
            **{("ray", address, "local"): "up" for address in agents},
            ("haproxy", f"127.0.0.1:{haproxy.port}", "local"): "up",
        }
        with cluster(state_dir, dashboard.port, haproxy.port) as home:
            with socket.create_server(("127.0.0.1", 0)) as taken:
                port = taken.getsockname()[1]
                said, state = start(state_dir, port, find_port())
            assert f"port {port} is taken: Prometheus gets {state.prometheus_port}" in said
            assert said.endswith("fresh\n")
            wait_for(lambda: targets(state), expected)

            groups = ask(state.prometheus_address, "/api/v1/rules")["data"]["groups"]
            names = {rule["name"] for group in groups for rule in group["rules"]}
            assert {"rayprism:error_ratio:rate5m", "RayprismTargetDown"} <= names
            # Only this machine can reach them, and `rayprism down` leaves them alone.
            assert {listener.laddr.ip for listener in listeners(state)} == {"127.0.0.1"}
            running = {process.pid for process in find_members(home.id, home.temp_dir)}
            assert not running & state.pids

            said = command("up", state_dir)
            assert "monitoring is up already" in said
            assert state.prometheus_address in said
            assert "it goes on as it was started" in said
            assert f"rayprism monitoring down --state {state_dir}" in said
            alerts_reach_alertmanager(state, agent, agents)
        # The cluster is gone.
        said = command("down", state_dir)
        assert "monitoring is down" in said
        assert not any(psutil.pid_exists(pid) for pid in state.pids)
        assert (state_dir / "monitoring" / "prometheus").is_dir()
        assert "no monitoring is up" in command("down", state_dir)


def listeners(state: MonitoringState) -> list[Any]:
    found = [
        connection
        for pid in state.pids
        for connection in psutil.Process(pid).net_connections(kind="all")
        if connection.status == psutil.CONN_LISTEN or connection.type == socket.SOCK_DGRAM
    ]
    assert len(found) == 2
    return found


def alerts_reach_alertmanager(state: MonitoringState, agent: Node, agents: list[str]) -> None:
    agent.metrics += 'ray_serve_application_status{application="flights"} 1\n'

    def firing() -> set[str]:
        alerts = ask(str(state.alertmanager_address), "/api/v2/alerts")
        return {alert["annotations"]["summary"] for alert in alerts}

    wait_for(lambda: "flights is DEPLOY_FAILED" in firing(), True)


@needs_programs
def test_what_was_left_or_has_other_ports_now(state_dir):
    with serving(Node()) as first, serving(Node()) as second:
        first.targets = [f"127.0.0.1:{first.port}"]
        second.targets = [f"127.0.0.1:{second.port}"]
        with cluster(state_dir, first.port):
            _, state = start(state_dir)
            assert state.alertmanager_pid is not None
            receivers = state_dir / "monitoring" / "alertmanager.yml"
            receivers.write_text(receivers.read_text() + "# ours\n")
            os.kill(state.alertmanager_pid, signal.SIGKILL)
            wait_for(lambda: psutil.pid_exists(state.alertmanager_pid), False)

            said, again = start(state_dir)
            assert "ending 1 processes that were left of it" in said
            assert not state.pids & again.pids
            assert not psutil.pid_exists(state.prometheus_pid)
            assert receivers.read_text().endswith("# ours\n")
        with cluster(state_dir, second.port, second.port):
            said, same = start(state_dir)
            assert said == (
                f"Prometheus now watches http://127.0.0.1:{second.port}\n"
                "it goes on as it was started; for other options, `rayprism monitoring down` "
                "first\nold\n"
            )
            assert same == again
            wait_for(
                lambda: targets(again),
                {
                    ("ray", second.targets[0], "local"): "up",
                    ("haproxy", second.targets[0], "local"): "up",
                },
            )
    (state_dir / "monitoring" / "monitoring.json").unlink()
    assert "monitoring is down" in command("down", state_dir)
    assert not any(psutil.pid_exists(pid) for pid in again.pids)


@needs_programs
def test_alertmanager_is_optional_and_a_token_is_passed_on(state_dir, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "prometheus").symlink_to(str(PROMETHEUS))
    with serving(Node()) as dashboard, cluster(state_dir, dashboard.port):
        said, state = start(
            state_dir,
            PATH=str(tmp_path / "bin"),
            RAY_AUTH_MODE="token",
            RAY_AUTH_TOKEN="secret",
        )
        assert "Alertmanager is not in PATH" in said
        assert state.alertmanager_address is None
        wait_for(lambda: dashboard.asked.get("/api/prometheus/sd"), "Bearer secret")
        token = state_dir / "monitoring" / "ray_token"
        assert token.stat().st_mode & 0o777 == 0o600
    assert "monitoring is down" in command("down", state_dir)


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli, ["monitoring", *arguments])
    return result.exit_code, result.output


def test_what_is_missing_is_said(state_dir, tmp_path, monkeypatch):
    code, said = invoke("up", "--state", str(state_dir))
    assert code == 1
    assert "`rayprism up` starts one" in said
    with cluster(state_dir, 1):
        monkeypatch.setenv("PATH", str(tmp_path))
        code, said = invoke("up", "--state", str(state_dir))
        assert code == 1
        assert "apt install prometheus prometheus-alertmanager" in said
        assert "docker/monitoring.yaml" in said
        code, said = invoke("up", "--state", str(state_dir), "--retention", "long")
        assert code == 1
        assert "the retention 'long' is not a time" in said
    code, said = invoke("up", "--state", str(state_dir))
    assert code == 1
    assert "has ended" in said


def test_what_does_not_start_leaves_nothing(state_dir, tmp_path, monkeypatch):
    program = tmp_path / "prometheus"
    program.write_text("#!/bin/sh\necho no room on the disk\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with cluster(state_dir, 1):
        code, said = invoke("up", "--state", str(state_dir))
    assert code == 1
    assert "prometheus did not start; its log ends with:\n  no room on the disk" in said
    assert not (state_dir / "monitoring" / "monitoring.json").exists()
