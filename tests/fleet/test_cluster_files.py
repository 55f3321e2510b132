"""Files for `ray up` are what Ray takes, and start Ray with what Serve needs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayprism.fleet.environment import (
    NODES_FILE,
    cluster_environment,
    main,
    nodes_environment,
    render_nodes_file,
)
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
    wanted = nodes_environment() | {"RAYPRISM_REPOSITORY": "/mnt/models"}
    assert {key: seen.get(key) for key in wanted} == wanted


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("key", START)
def test_ray_does_not_start_without_it(name: str, key: str, tmp_path: Path) -> None:
    assert run_start(read(name)[key], tmp_path, with_file=False) == {}


def run_start(commands: list[str], home: Path, *, with_file: bool = True) -> dict[str, str]:
    """What `ray start` finds in its environment; empty where it was not started."""
    told = home / "told"
    ray = home / "venv/bin/ray"
    ray.parent.mkdir(parents=True)
    ray.write_text(f'#!/bin/sh\ntest "$1" = stop || env -0 > {told}\n')
    ray.chmod(0o755)
    (home / "rayprism").mkdir()
    if with_file:
        (home / "rayprism" / NODES_FILE.name).write_bytes((ROOT / NODES_FILE).read_bytes())
    environment = {"HOME": str(home), "PATH": os.defpath, "RAY_HEAD_IP": "10.0.0.1"}
    for command in commands:
        subprocess.run(["bash", "-c", command], env=environment, capture_output=True, timeout=30)
    lines = told.read_text().split("\0") if told.exists() else []
    return dict(line.split("=", 1) for line in lines if line)


@pytest.mark.parametrize("name", FILES)
def test_what_is_mounted_is_there(name: str) -> None:
    mounts = read(name)["file_mounts"]
    sources = [source for source in mounts.values() if not source.startswith("~")]
    assert all((ROOT / source).exists() for source in sources)
    assert {"cluster.env", "src", "constraints.txt"} <= set(sources)
    # Without the token the nodes could not join each other.
    assert mounts["~/.ray/auth_token"] == "~/.ray/auth_token"


@pytest.mark.parametrize("name", FILES)
def test_both_start_ray_in_the_same_way(name: str) -> None:
    def plain(command: str) -> str:
        return command.replace("--num-cpus=0 ", "").replace("RAY_enable_autoscaler_v2=0 && ", "")

    for key in START:
        assert [plain(line) for line in read(name)[key]] == read("cluster.yaml")[key]


def test_environment_file_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["--check"]) == 0
    assert main(["--else"]) == 2


def test_environment_file_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--check"]) == 1
    assert main([]) == 0
    assert main(["--check"]) == 0
    assert NODES_FILE.read_text() == render_nodes_file()
    NODES_FILE.write_text("RAY_AUTH_MODE=disabled\n")
    assert main(["--check"]) == 1


def test_a_laptop_and_a_cluster_differ_only_where_they_must(tmp_path: Path) -> None:
    one = cluster_environment("id", tmp_path, None, base={})
    many = nodes_environment()
    assert {name for name in many if one.get(name) != many[name]} == {
        "RAY_AUTH_MODE",
        "RAY_SERVE_HAPROXY_LOG_TARGET",
        "RAY_gcs_rpc_server_reconnect_timeout_s",
    }
