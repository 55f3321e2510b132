"""`rayprism up`, `status`, `wait` and `down` for real, on ports of their own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from rayprism.errors import ClusterError
from rayprism.fleet.cluster import start_cluster
from rayprism.fleet.processes import find_members, find_port
from rayprism.fleet.state import ClusterSettings, ClusterState, find_cluster

BIN = Path(sys.executable).parent
APP = """
from ray import serve

@serve.deployment
class Greeter:
    def __init__(self, fail):
        if fail:
            raise RuntimeError("the weights are missing")

    async def __call__(self, request):
        return "hello"

def build(args):
    return Greeter.bind(args["fail"])
"""
SERVE = """
http_options: {{host: 127.0.0.1, port: {port}}}
applications:
- name: greeter
  import_path: greeting:build
  args: {{fail: {fail}}}
  deployments:
  - {{name: Greeter, ray_actor_options: {{num_cpus: 0.1}}}}
"""


class Shell:
    """Runs commands in a folder, on a cluster of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state_dir = folder / "state"
        self.dashboard_port = find_port()
        self.address = f"http://127.0.0.1:{self.dashboard_port}"
        self.environment = os.environ | {"PYTHONPATH": str(folder)}
        self.environment.pop("RAYPRISM_REPOSITORY", None)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(BIN / command[0]), *command[1:]],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=180,
        )

    def rayprism(self, command: str, *options: str) -> subprocess.CompletedProcess[str]:
        return self.run("rayprism", command, "--state", str(self.state_dir), *options)

    def up(self, *options: str) -> subprocess.CompletedProcess[str]:
        port = str(self.dashboard_port)
        return self.rayprism("up", "--dashboard-port", port, "--num-cpus", "2", *options)

    def state(self) -> ClusterState:
        state = find_cluster(self.state_dir)
        assert state is not None
        return state


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    (tmp_path / "greeting.py").write_text(APP)
    (tmp_path / "models").mkdir()
    shell = Shell(tmp_path)
    yield shell
    shell.rayprism("down")


def left_of(state: ClusterState) -> list[psutil.Process]:
    return find_members(state.id, Path(state.temp_dir))


@pytest.mark.e2e
def test_a_life_of_a_cluster(shell):
    up = shell.up("--repository", "models", "--drain-s", "0")
    assert up.returncode == 0, up.stderr
    assert f"serve deploy --address {shell.address}" in up.stdout
    state = shell.state()
    assert state.settings.repository == str(shell.folder / "models")
    environment = psutil.Process(state.pid).environ()
    assert environment["RAYPRISM_REPOSITORY"] == str(shell.folder / "models")
    assert environment["RAY_SERVE_ENABLE_HA_PROXY"] == "1"

    again = shell.up("--repository", "models", "--drain-s", "0")
    assert (again.returncode, "is up already" in again.stdout) == (0, True)
    other = shell.up()
    assert other.returncode == 1
    assert "repository is" in other.stderr
    nothing = shell.rayprism("status")
    assert (nothing.returncode, "no applications" in nothing.stdout) == (1, True)

    port = find_port()
    for fail in ("false", "true"):
        (shell.folder / f"{fail}.yaml").write_text(SERVE.format(port=port, fail=fail))
    deploy = shell.run("serve", "deploy", "--address", shell.address, "false.yaml")
    assert deploy.returncode == 0, deploy.stderr
    wait = shell.rayprism("wait", "--timeout", "120")
    assert wait.returncode == 0, wait.stderr
    assert f"1 application running at http://127.0.0.1:{port}" in wait.stdout
    assert "greeter RUNNING (Greeter 1/1)" in wait.stderr
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log:
        log.bind(f"{state.temp_dir}/h/log.sock")
        log.settimeout(10)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/?logged", timeout=10) as response:
            assert response.read() == b"hello"
        while b"GET /?logged HTTP/1.1" not in log.recv(8192):
            pass  # the proxy's health checks
    status = shell.rayprism("status", "--json")
    assert status.returncode == 0, status.stderr
    shown = json.loads(status.stdout)
    assert shown["cluster"]["dashboard_address"] == shell.address
    assert shown["serve"]["applications"][0]["status"] == "RUNNING"

    shell.run("serve", "deploy", "--address", shell.address, "true.yaml")
    wait = shell.rayprism("wait", "--timeout", "120")
    assert wait.returncode == 1
    assert "RuntimeError: the weights are missing" in wait.stderr
    assert "Traceback" not in wait.stderr

    down = shell.rayprism("down")
    assert (down.returncode, down.stdout) == (0, "the cluster is down\n"), down.stderr
    assert left_of(state) == []
    assert not Path(state.temp_dir).exists()
    assert not (shell.state_dir / "cluster.json").exists()
    again = shell.rayprism("down")
    assert (again.returncode, again.stdout) == (0, "no cluster is up\n")


@pytest.mark.e2e
def test_down_after_the_head_was_killed(shell):
    up = shell.up("--no-haproxy")
    assert up.returncode == 0, up.stderr
    state = shell.state()
    os.kill(state.pid, signal.SIGKILL)
    psutil.wait_procs([psutil.Process(state.pid)] if psutil.pid_exists(state.pid) else [], 5)
    assert find_cluster(shell.state_dir) is None
    status = shell.rayprism("status")
    assert (status.returncode, "is gone" in status.stderr) == (1, True)
    down = shell.rayprism("down")
    assert (down.returncode, down.stdout) == (0, "the cluster is down\n"), down.stderr
    assert left_of(state) == []
    assert not Path(state.temp_dir).exists()


@pytest.mark.e2e
def test_a_start_that_fails_shows_the_log_and_leaves_nothing(shell):
    scripts = shell.folder / "ray" / "scripts"
    scripts.mkdir(parents=True)
    (scripts / "scripts.py").write_text("raise SystemExit('there is no room for Ray')")
    for folder in (scripts, scripts.parent):
        (folder / "__init__.py").touch()
    up = shell.up()
    assert up.returncode == 1
    assert "Ray did not start; its log ends with:\n  there is no room for Ray" in up.stderr
    assert "Traceback" not in up.stderr
    assert find_cluster(shell.state_dir) is None
    assert not (shell.state_dir / "cluster.json").exists()


@pytest.mark.e2e
def test_token_mode_without_a_token_is_told_at_once(shell):
    shell.environment |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "",
        "RAY_AUTH_TOKEN_PATH": str(shell.folder / "none"),
    }
    up = shell.up()
    assert (up.returncode, "get-auth-token" in up.stderr) == (1, True)


def test_a_taken_port_is_named(tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ClusterError, match=rf"{port}.*is taken by .*pid {os.getpid()}"):
            start_cluster(ClusterSettings(dashboard_port=port), tmp_path)


def test_a_broken_state_file_is_no_cluster(tmp_path):
    (tmp_path / "cluster.json").write_text("{")
    assert find_cluster(tmp_path) is None


def test_the_pid_of_another_process_is_no_cluster(tmp_path):
    state = ClusterState(
        id="0",
        pid=os.getpid(),
        started="",
        dashboard_address="",
        ray_address="",
        temp_dir=str(tmp_path / "none"),
        log="",
        settings=ClusterSettings(),
        ports={},
        versions={},
    )
    state.write(tmp_path / "cluster.json")
    assert ClusterState.read(tmp_path / "cluster.json") == state
    assert find_cluster(tmp_path) is None
