"""docker/entrypoint.sh, run as the container engine would, with a stand-in for Ray alone."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "docker" / "entrypoint.sh"
RAYPRISM = """\
#!/bin/sh
printf '%s\\n' "$@"
echo "files=$(ulimit -n)" >&2
echo "drain=${RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S-unset} pid=$$"
"""


class Agent(BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/api/healthz" else 404)
        self.end_headers()
        self.wfile.write(b"raylet: success")

    def log_message(self, *_: object) -> None:
        pass


class Container:
    """A folder with the commands of the image."""

    def __init__(self, folder: Path) -> None:
        (folder / "bin").mkdir()
        command = folder / "bin" / "rayprism"
        command.write_text(RAYPRISM)
        command.chmod(0o755)
        self.environment = {
            "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "TMPDIR": str(folder),
        }

    def run(
        self, *arguments: str, before: tuple[str, ...] = (), **environment: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*before, SCRIPT, *arguments],
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=30,
        )


@pytest.fixture
def container(tmp_path: Path) -> Container:
    return Container(tmp_path)


@pytest.fixture
def agent() -> Iterator[tuple[type[Agent], int]]:
    class Handler(Agent):
        pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield Handler, server.server_port
        server.shutdown()
        thread.join()


def test_head_starts_ray_in_the_environment_of_serve(container):
    done = container.run("head", "--num-cpus=0")
    lines = done.stdout.splitlines()
    assert lines[:5] == ["environment", "ray", "start", "--block", "--disable-usage-stats"]
    assert {"--head", "--port=6379", "--dashboard-host=0.0.0.0"} < set(lines)
    # After ours, so that it wins.
    assert lines[-2] == "--num-cpus=0"
    # A head has nowhere to drain to.
    assert lines[-1].startswith("drain=0 ")


def test_worker_joins_the_head_and_drains(container):
    lines = container.run("worker", "head:6379", "--num-cpus=2").stdout.splitlines()
    assert lines[:3] == ["environment", "ray", "start"]
    assert lines[-3:-1] == ["--address=head:6379", "--num-cpus=2"]
    assert "--head" not in lines
    assert lines[-1].startswith("drain=unset ")


def test_the_operators_drain_time_wins(container):
    done = container.run("head", RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S="7")
    assert "drain=7 " in done.stdout


def test_a_node_may_open_as_many_files_as_it_is_allowed_to(container):
    most = min(4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    limits = ("bash", "-c", f'ulimit -Sn 1024; ulimit -Hn {most}; exec "$@"', "bash")
    assert container.run("head", before=limits).stderr == f"files={most}\n"


@pytest.mark.parametrize("arguments", [(), ("worker",), ("worker", "--num-cpus=2")])
def test_what_is_missing_is_said(container, arguments):
    done = container.run(*arguments)
    assert done.returncode == 2
    assert "head:6379" in done.stderr or "worker HOST:PORT" in done.stderr


def test_any_other_command_runs_as_it_is(container):
    done = container.run("sh", "-c", "printf '%s|' \"$@\"; exit 7", "sh", "a b", "*")
    assert done.stdout == "a b|*|"
    assert done.returncode == 7


@pytest.mark.parametrize("arguments", [("head",), ("sleep", "60")])
def test_signals_reach_the_command(tmp_path, arguments):
    container = Container(tmp_path)
    (tmp_path / "bin" / "rayprism").write_text("#!/bin/sh\nexec sleep 60\n")
    with subprocess.Popen([SCRIPT, *arguments], env=container.environment) as process:
        deadline = time.monotonic() + 10
        # It takes the place of the script.
        while b"sleep" not in Path(f"/proc/{process.pid}/cmdline").read_bytes().split(b"\0")[0]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.terminate()
        assert process.wait(timeout=10) == -signal.SIGTERM


@pytest.mark.parametrize("role", [("head",), ("worker", "head:6379")])
@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1)])
def test_health_of_a_node_is_what_its_agent_says(container, agent, role, status, code):
    handler, port = agent
    handler.status = status
    started = container.run(*role, RAYPRISM_AGENT_PORT=str(port))
    assert f"--dashboard-agent-listen-port={port}" in started.stdout
    done = container.run("health", RAYPRISM_AGENT_PORT=str(port))
    assert done.returncode == code
    assert "raylet: success" in done.stdout


def test_a_node_without_an_agent_is_not_healthy(container, agent):
    container.run("head")
    # A proxy of the environment is not asked.
    found = container.run("health", RAYPRISM_AGENT_PORT="1", http_proxy=f"127.0.0.1:{agent[1]}")
    assert found.returncode != 0


def test_what_is_no_node_is_healthy(container):
    assert container.run("health", RAYPRISM_AGENT_PORT="1").returncode == 0
