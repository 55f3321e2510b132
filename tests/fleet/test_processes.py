"""Finding the processes of a cluster, and only those; ports; the environment of the head."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from rayprism.fleet.environment import cluster_environment
from rayprism.fleet.processes import (
    MARKER_VARIABLE,
    end_processes,
    find_members,
    find_port,
    is_free,
    port_holder,
)

SLEEP = "import time; print('up', flush=True); time.sleep(60)"
DEAF = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEP}"
CHILD = (
    "import os, subprocess, sys, time\n"
    f"env = {{k: v for k, v in os.environ.items() if k != {MARKER_VARIABLE!r}}}\n"
    "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], env=env)\n"
    "print('up', flush=True); time.sleep(60)"
)


@pytest.fixture
def start() -> Iterator:
    started: list[subprocess.Popen[str]] = []

    def run(code: str, *arguments: str, marker: str | None = None) -> subprocess.Popen[str]:
        environment = {key: v for key, v in os.environ.items() if key != MARKER_VARIABLE}
        if marker is not None:
            environment[MARKER_VARIABLE] = marker
        process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def pids(cluster: str, temp_dir: Path) -> set[int]:
    return {process.pid for process in find_members(cluster, temp_dir)}


def test_members_are_found_by_the_marker(start, tmp_path):
    mine, other, plain = (
        start(SLEEP, marker="mine"),
        start(SLEEP, marker="other"),
        start(SLEEP),
    )
    assert pids("mine", tmp_path) == {mine.pid}
    assert end_processes("mine", tmp_path) == 1
    assert mine.poll() is not None
    assert other.poll() is None
    assert plain.poll() is None


def test_members_are_found_by_what_they_write(start, tmp_path):
    # Ray's agents overwrite their environment with their title.
    code = f"import sys; f = open(sys.argv[1], sys.argv[2]); {SLEEP}"
    (tmp_path / "log").write_text("")
    writer = start(code, str(tmp_path / "log"), "a")
    start(code, str(tmp_path / "log"), "r")
    assert pids("mine", tmp_path) == {writer.pid}


def test_children_of_members_are_members(start, tmp_path):
    parent = start(CHILD, marker="mine")
    child = psutil.Process(parent.pid).children()[0]
    assert pids("mine", tmp_path) == {parent.pid, child.pid}
    assert end_processes("mine", tmp_path) == 2
    assert not child.is_running()


def test_who_does_not_listen_is_killed(start, tmp_path):
    deaf = start(DEAF, marker="mine")
    assert end_processes("mine", tmp_path, grace_s=0.3) == 1
    assert deaf.poll() is not None


def test_this_process_is_never_a_member(monkeypatch, tmp_path):
    with (tmp_path / "log").open("w"):
        assert pids("mine", tmp_path) == set()
        assert end_processes("mine", tmp_path) == 0


def test_ports():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert not is_free(port)
        assert f"pid {os.getpid()}" in port_holder(port)
        assert find_port(port) != port
    assert is_free(port)
    assert find_port(port) == port
    assert find_port(port, taken=[port]) != port


def test_environment_has_what_serve_needs(tmp_path):
    found = cluster_environment("id", tmp_path, tmp_path / "models", drain_s=2, base={})
    assert found[MARKER_VARIABLE] == "id"
    assert found["RAYPRISM_REPOSITORY"] == str(tmp_path / "models")
    assert found["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    assert found["RAY_AUTH_MODE"] == "disabled"
    assert found["RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"] == "2"
    assert found["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)


def test_what_the_user_set_wins(tmp_path):
    theirs = {
        "RAY_AUTH_MODE": "token",
        "RAY_SERVE_HAPROXY_RETRIES": "9",
        "RAY_SERVE_HAPROXY_METRICS_PORT": "9999",
        "RAY_ADDRESS": "elsewhere:6379",
        MARKER_VARIABLE: "another",
    }
    found = cluster_environment("id", tmp_path, None, base=theirs)
    assert found["RAY_AUTH_MODE"] == "token"
    assert found["RAY_SERVE_HAPROXY_RETRIES"] == "9"
    assert found["RAY_SERVE_HAPROXY_METRICS_PORT"] == "9999"
    assert found[MARKER_VARIABLE] == "id"
    assert "RAY_ADDRESS" not in found
    assert "RAYPRISM_REPOSITORY" not in found


def test_python_proxy_needs_no_haproxy_settings(tmp_path):
    base = {"RAY_SERVE_ENABLE_HA_PROXY": "1"}
    found = cluster_environment("id", tmp_path, None, haproxy=False, base=base)
    assert found["RAY_SERVE_ENABLE_HA_PROXY"] == "0"
    assert "RAY_SERVE_HAPROXY_RETRIES" not in found


def test_ports_that_are_taken_are_avoided(tmp_path):
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            other.bind(("127.0.0.1", 8404))
        except OSError:
            pytest.skip("8404 is taken by someone else")
        other.listen()
        found = cluster_environment("id", tmp_path, None, base={})
    assert found["RAY_SERVE_HAPROXY_STATS_PORT"] != "8404"
    ports = [value for name, value in found.items() if name.endswith("_PORT")]
    assert len(set(ports)) == len(ports) == 4
