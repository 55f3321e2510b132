"""Files for `ray up` are what Ray takes, and start Ray with what Serve needs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayprism.fleet.environment import node_variables
from rayprism.fleet.launcher import main as check_files
from rayprism.fleet.launcher import prepare_cluster

ROOT = Path(__file__).resolve().parents[2]
FILES = ["cluster.yaml", "cluster-onprem.yaml"]
START = ["head_start_ray_commands", "worker_start_ray_commands"]


def read(name: str) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((ROOT / name).read_text())
    return document


def test_ray_takes_the_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_files([str(ROOT / name) for name in FILES]) == 0
    assert "cpu 2 to 4, cpu_spot 0 to 8, gpu 0 to 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"idle_timeout_minute": 5}, "idle_timeout_minute"),
        ({"max_workers": 1}, "smaller than the"),
        ({"provider": {"type": "local", "head_ip": "10.0.0.1"}}, ""),
        ({"provider": {"type": "nowhere"}}, "nowhere"),
    ],
)
def test_a_wrong_file_is_refused(
    change: dict[str, Any], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(read("cluster.yaml") | change))
    assert check_files([str(path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"{path}: Ray does not take it: ")
    assert told in error


@pytest.mark.parametrize("name", FILES)
def test_everything_is_installed_into_the_venv(name: str) -> None:
    """Ray's defaults for a provider, which are merged in, install beside it."""
    config = prepare_cluster(ROOT / name)
    lists = [config["head_setup_commands"], config["worker_setup_commands"]]
    lists += [
        kind["worker_setup_commands"]
        for kind in config["available_node_types"].values()
        if "worker_setup_commands" in kind
    ]
    for commands in lists:
        installs = [command for command in commands if "pip install" in command]
        assert installs
        assert all("~/venv/bin/pip install" in command for command in installs)


def test_every_node_gives_up_a_silent_one() -> None:
    config = prepare_cluster(ROOT / "cluster.yaml")
    gpu = config["available_node_types"]["gpu"]
    for commands in (
        config["head_setup_commands"],
        config["worker_setup_commands"],
        gpu["worker_setup_commands"],
    ):
        assert "sudo sysctl -qw net.ipv4.tcp_retries2=5" in commands


def test_no_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check_files([]) == 2
    assert check_files([str(tmp_path / "absent.yaml")]) == 1
    assert "absent.yaml" in capsys.readouterr().err


def test_on_premises_machines_stay() -> None:
    config = prepare_cluster(ROOT / "cluster-onprem.yaml")
    (node_type,) = config["available_node_types"].values()
    machines = len(config["provider"]["worker_ips"])
    assert (node_type["min_workers"], node_type["max_workers"]) == (machines, machines)


def test_bounds_on_the_cloud() -> None:
    config = prepare_cluster(ROOT / "cluster.yaml")
    types = config["available_node_types"]
    assert types["head"]["max_workers"] == 0
    assert types["head"]["resources"] == {"CPU": 0}
    workers = [kind for name, kind in types.items() if name != "head"]
    assert all(kind["min_workers"] <= kind["max_workers"] for kind in workers)
    assert sum(kind["max_workers"] for kind in workers) == config["max_workers"]
    spot = [name for name, kind in types.items() if is_spot(kind)]
    assert spot == ["cpu_spot"]
    # Losing all of them at once must leave two that serve.
    stay = [kind["min_workers"] for kind in workers if not is_spot(kind)]
    assert sum(stay) >= 2
    assert types["gpu"]["resources"]["GPU"] == 1
    assert "[gpu]" in types["gpu"]["worker_setup_commands"][-1]


def is_spot(kind: dict[str, Any]) -> bool:
    return kind["node_config"].get("InstanceMarketOptions") == {"MarketType": "spot"}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("key", START)
def test_ray_starts_with_the_environment_that_serve_needs(
    name: str, key: str, tmp_path: Path
) -> None:
    """The command itself is run, with a `ray` that tells what it was given."""
    seen = run_start(read(name)[key], tmp_path)
    wanted = node_variables(Path("/tmp/ray")) | {
        # Whoever reaches a port of Ray's may run code on it.
        "RAY_AUTH_MODE": "token",
        "RAY_gcs_rpc_server_reconnect_timeout_s": "3600",
        "RAYPRISM_REPOSITORY": "/mnt/models",
    }
    assert {key: seen.get(key) for key in wanted} == wanted


def run_start(commands: list[str], home: Path) -> dict[str, str]:
    """What `ray start` finds in its environment."""
    told = home / "told"
    programs = home / "venv/bin"
    programs.mkdir(parents=True)
    (programs / "ray").write_text(f'#!/bin/sh\ntest "$1" = stop || env -0 > {told}\n')
    # With this folder's `ray` beside it, as in a venv.
    run = "from rayprism.cli.main import main; raise SystemExit(main())"
    (programs / "rayprism").write_text(
        f"#!{sys.executable}\nimport sys; sys.executable = {str(programs / 'python')!r}; {run}\n"
    )
    for program in programs.iterdir():
        program.chmod(0o755)
    environment = {
        "HOME": str(home),
        "PATH": os.defpath,
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
        "RAY_HEAD_IP": "10.0.0.1",
    }
    for command in commands:
        subprocess.run(["bash", "-c", command], env=environment, capture_output=True, timeout=30)
    return dict(line.split("=", 1) for line in told.read_text().split("\0") if line)


@pytest.mark.parametrize("name", FILES)
def test_what_is_mounted_is_there(name: str) -> None:
    mounts = read(name)["file_mounts"]
    sources = [source for source in mounts.values() if not source.startswith("~")]
    assert all((ROOT / source).exists() for source in sources)
    assert {"src", "constraints.txt"} <= set(sources)
    # Without the token the nodes could not join each other.
    assert mounts["~/.ray/auth_token"] == "~/.ray/auth_token"


@pytest.mark.parametrize("name", FILES)
def test_both_start_ray_in_the_same_way(name: str) -> None:
    def plain(command: str) -> str:
        return command.replace("--num-cpus=0 ", "").replace(" RAY_enable_autoscaler_v2=0", "")

    for key in START:
        assert [plain(line) for line in read(name)[key]] == read("cluster.yaml")[key]
