"""The compose files: what they mount is there, what they publish is for this machine alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docker"
FILES = ("compose.yaml", "monitoring.yaml")
OURS = ("rayprism:", "rayprism-gpu:")
PROVISIONING = ROOT / "dashboards" / "grafana" / "provisioning"


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / name).read_text())


def services(name: str) -> dict[str, Any]:
    return read(name)["services"]


def mounts(service: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for mount in service["volumes"]:
        source, target = mount.split(":")[:2]
        yield source, target


@pytest.fixture(params=FILES)
def file(request: pytest.FixtureRequest) -> str:
    return request.param


def test_what_is_mounted_is_there(file):
    volumes = read(file)["volumes"]
    for service in services(file).values():
        for source, _ in mounts(service):
            if source.startswith("."):
                assert (FOLDER / source).exists(), source
            else:
                assert source in volumes


def test_grafana_gets_every_dashboard_and_its_prometheus(file):
    grafana = services(file)["grafana"]
    folder = yaml.safe_load((PROVISIONING / "dashboards" / "rayprism.yaml").read_text())
    path = folder["providers"][0]["options"]["path"]
    shown = {Path(source).name for source, target in mounts(grafana) if target.startswith(path)}
    assert shown == {path.name for path in (ROOT / "dashboards").glob("*.json")}
    source = yaml.safe_load((PROVISIONING / "datasources" / "prometheus.yaml").read_text())
    assert source["datasources"][0]["url"] == "$PROMETHEUS_URL"
    host = "127.0.0.1" if file == "monitoring.yaml" else "prometheus"
    assert grafana["environment"]["PROMETHEUS_URL"] == f"http://{host}:9090"


def test_images_are_pinned_and_ours_are_of_this_version(file):
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)
    for service in services(file).values():
        image = service["image"]
        assert re.fullmatch(r"[\w/-]+:v?\d+(\.\d+){1,2}", image)
        if image.startswith(OURS):
            assert image.partition(":")[2] == version[1]


def test_both_can_stand_side_by_side():
    names = {read(file)["name"] for file in FILES}
    assert len(names) == len(FILES)


def test_no_secret_is_written_down(file):
    for service in services(file).values():
        for name, value in service.get("environment", {}).items():
            if re.search("PASSWORD|SECRET|ACCESS_KEY", name):
                assert re.fullmatch(r"\$\{\w+:\?.+\}", value), name


def test_only_this_machine_can_connect(file):
    for name, service in services(file).items():
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), name
        if service.get("network_mode") == "host":
            assert "127.0.0.1" in str(service.get("command")) + str(service.get("environment"))
            assert file == "monitoring.yaml"


def test_prometheus_asks_services_that_are_there():
    found = services("compose.yaml")
    command = "\n".join(found["prometheus"]["command"])
    path = re.search("--config.file=/etc/prometheus/(.+)", command)[1]
    config = yaml.safe_load((ROOT / "dashboards" / "prometheus" / path).read_text())
    text = yaml.safe_dump(config)
    hosts = set(re.findall(r"http://([\w-]+):(\d+)", text))
    hosts |= {
        tuple(target.split(":"))
        for manager in config["alerting"]["alertmanagers"]
        for target in manager["static_configs"][0]["targets"]
    }
    assert hosts == {("head", "8265"), ("alertmanager", "9093")}
    for host, port in hosts:
        assert any(entry.endswith(f":{port}") for entry in found[host]["ports"])
    mounted = {target for _, target in mounts(found["prometheus"])}
    assert "/etc/prometheus" in mounted


def test_nodes_are_confined_and_share_one_setup():
    found = services("compose.yaml")
    nodes = {name: entry for name, entry in found.items() if entry["image"].startswith(OURS)}
    assert nodes.keys() == {"head", "worker", "gpu-worker", "models", "toolbox"}
    for name, node in nodes.items():
        assert node["read_only"] is True
        assert node["cap_drop"] == ["ALL"]
        target = {target: source for source, target in mounts(node)}
        assert target["/models"] == "models"
        writes = "models:/models" in node["volumes"]
        assert writes == (name in ("models", "toolbox"))
    roles = {name: node["command"][0] for name, node in nodes.items()}
    assert roles["head"] == "head"
    assert roles["worker"] == roles["gpu-worker"] == "worker"
    for name in ("worker", "gpu-worker"):
        address = nodes[name]["command"][1]
        assert address == "head:6379"
        drain = float(nodes[name]["environment"]["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        assert drain < float(nodes[name]["stop_grace_period"].removesuffix("s"))


def test_what_others_wait_for_says_when_it_is_healthy():
    found = services("compose.yaml")
    for service in found.values():
        waits = service.get("depends_on", {})
        for name in waits:
            condition = waits[name]["condition"] if isinstance(waits, dict) else ""
            other = found[name]
            if condition == "service_healthy":
                # Our images have a health check of their own.
                assert other["image"].startswith(OURS) or "healthcheck" in other
            if condition == "service_completed_successfully":
                assert other["restart"] == "no"


def test_make_makes_every_secret_that_is_asked_for():
    asked = set(re.findall(r"\$\{(\w+):\?", (FOLDER / "compose.yaml").read_text()))
    recipe = (ROOT / "Makefile").read_text().partition("\ndocker/.env:")[2].partition("\n\n")[0]
    assert asked
    for name in asked:
        assert name in recipe
    assert "docker/.env" in (ROOT / ".gitignore").read_text().splitlines()
