"""`ray up cluster-onprem.yaml`, over ssh, onto machines that have nothing but Python."""

from __future__ import annotations

import contextlib
import copy
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from rayprism.fleet.rest import ServeClient
from rayprism.fleet.waiting import wait_until_running
from tests.nodes.cluster import cluster_file
from tests.nodes.machines import HOME, Machine
from tests.support.fleet import wait_for
from tests.support.models import mlp_example

pytestmark = [pytest.mark.nodes, pytest.mark.timeout(600)]

_ROOT = Path(__file__).resolve().parents[2]
_BIN = Path(sys.executable).parent
_SSHD = "/usr/sbin/sshd"

_SSHD_CONFIG = f"""\
HostKey {HOME}/host_key
AuthorizedKeysFile {HOME}/authorized_keys
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
PidFile none
"""
if "PYTHONPATH" in os.environ:  # where the code under test is from
    _SSHD_CONFIG += f"SetEnv PYTHONPATH={os.environ['PYTHONPATH']}\n"

_SERVE = """\
proxy_location: EveryNode
http_options: {host: 0.0.0.0, port: 8000}
applications:
  - name: tiny
    route_prefix: /v2/models/tiny
    import_path: rayprism.serving.app:build
    args: {model: tiny, version: 1}
    deployments:
      - {name: model, num_replicas: 2, max_replicas_per_node: 1, ray_actor_options: {num_cpus: 0.5}}
"""


@pytest.fixture
def machines(tmp_path: Path, models: Path) -> Iterator[list[Machine]]:
    """Three that can be reached over ssh, with a key of ours."""
    if not Path(_SSHD).exists() or shutil.which("rsync") is None:
        pytest.skip("needs sshd and rsync (apt install openssh-server rsync)")
    if Path("/proc/self/uid_map").read_text().split()[2] == "1":
        pytest.skip(
            "sshd needs more users than a namespace without root has: sudo make test-cluster"
        )
    for name in ("key", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name])
    home = {"authorized_keys": tmp_path / "key.pub", "host_key": tmp_path / "host_key"}
    machines = [
        Machine(number, tmp_path / str(number), mounts={"/mnt/models": models}, home=home)
        for number in (1, 2, 3)
    ]
    try:
        for machine in machines:
            machine.write("sshd_config", _SSHD_CONFIG)
            # ssh finds the home there, whatever the environment says.
            passwd = Path("/etc/passwd").read_text().replace(":/root:", f":{HOME}:")
            machine.write("passwd", passwd)
            machine.run(
                "mount --bind ~/passwd /etc/passwd && "
                f"chmod 600 ~/host_key && mount -t tmpfs tmpfs /run && mkdir /run/sshd && "
                f"{_SSHD} -f {HOME}/sshd_config"
            )
        yield machines
    finally:
        for machine in machines:
            machine.kill()


def filled_in(machines: list[Machine], folder: Path) -> dict[str, Any]:
    """The file with our machines in it; what it installs is what runs these tests."""
    file = copy.deepcopy(cluster_file("cluster-onprem.yaml"))
    addresses = [machine.address for machine in machines]
    file["provider"] |= {"head_ip": addresses[0], "worker_ips": addresses[1:]}
    file["auth"] = {"ssh_user": "root", "ssh_private_key": str(folder / "key")}
    file |= {"min_workers": 2, "max_workers": 2}
    assert "pip install" in file["setup_commands"][-1]
    file["setup_commands"] = [f"ln -sfn {sys.prefix} ~/venv"]
    return file


def test_ray_up(machines: list[Machine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    operator = tmp_path / "operator"
    (operator / ".ray").mkdir(parents=True)
    (operator / ".ray/auth_token").write_text(secrets.token_hex(32))
    monkeypatch.setenv("HOME", str(operator))
    monkeypatch.setenv("RAY_TMPDIR", str(operator))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(operator / ".ray/auth_token"))
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump(filled_in(machines, tmp_path)))
    up = ray("up", "--yes", "--no-config-cache", str(file))
    assert up.returncode == 0, up.stdout + up.stderr
    with tunnel(file) as address:
        nodes = wait_for(lambda: living(file, 3), 150)
        assert set(nodes) == {machine.address for machine in machines}
        serve_file = tmp_path / "serve.yaml"
        serve_file.write_text(_SERVE)
        done = subprocess.run(
            [_BIN / "serve", "deploy", "--address", address, serve_file],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        wait_until_running(ServeClient(address, timeout_s=30), timeout_s=120)
        for machine in machines[1:]:
            url = f"http://{machine.address}:8000"
            wait_for(lambda url=url: ready(url), 60)
            answer = httpx.post(f"{url}/v2/models/tiny/infer", json=mlp_example())
            assert answer.status_code == 200, answer.text
    down = ray("down", "--yes", str(file))
    assert down.returncode == 0, down.stdout + down.stderr


def ray(*arguments: str, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [_BIN / "ray", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        cwd=_ROOT,
    )


@contextlib.contextmanager
def tunnel(file: Path) -> Iterator[str]:
    """`ray dashboard`: the head's dashboard on this side."""
    process = subprocess.Popen(
        [_BIN / "ray", "dashboard", str(file)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=_ROOT,
    )
    address = "http://127.0.0.1:8265"
    try:
        wait_for(lambda: answers(address), 60)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=30)


def answers(address: str) -> bool:
    with contextlib.suppress(Exception):
        ServeClient(address, timeout_s=5).state()
        return True
    return False


def living(file: Path, count: int) -> list[str] | None:
    """Addresses of Ray's living nodes, once there are so many."""
    script = "~/venv/bin/ray list nodes --filter state=ALIVE --format=yaml"
    found = ray("exec", str(file), f"RAY_AUTH_MODE=token {script}")
    addresses = [
        line.split()[-1] for line in found.stdout.splitlines() if line.strip().startswith("node_ip")
    ]
    return addresses if len(addresses) == count else None


def ready(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{url}/-/healthz").status_code == 200
    return False
