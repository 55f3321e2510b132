"""A real Prometheus for tests, with rules whose windows are short."""

from __future__ import annotations

import math
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from rayprism.fleet.processes import find_port
from rayprism.telemetry.prometheus import build_prometheus_config
from rayprism.telemetry.rules import build_rules
from tests.support.fleet import wait_for

__all__ = ["Prometheus", "running_prometheus"]

Series = tuple[dict[str, str], float]


@dataclass(slots=True)
class Prometheus:
    """One that runs.

    Args:
        url: Where.
        client: Kept open: it is asked several times a second.
    """

    url: str
    client: httpx.Client

    def get(self, path: str, **parameters: Any) -> Any:
        """The data of an answer of its HTTP API."""
        answer = self.client.get(f"{self.url}/api/v1/{path}", params=parameters).json()
        assert answer["status"] == "success", (parameters, answer)
        return answer["data"]

    def query(self, expr: str) -> list[Series]:
        """What an expression gives now."""
        result = self.get("query", query=expr)
        if result["resultType"] == "scalar":
            return [({}, float(result["result"][1]))]
        return [(series["metric"], float(series["value"][1])) for series in result["result"]]

    def value(self, expr: str) -> float:
        """What an expression with one value gives now; 0 where it gives none."""
        found = [value for _, value in self.query(expr) if not math.isnan(value)]
        assert len(found) <= 1, (expr, found)
        return found[0] if found else 0.0

    def firing(self) -> set[str]:
        """Names of the alerts that fire."""
        return {
            alert["labels"]["alertname"]
            for alert in self.get("alerts")["alerts"]
            if alert["state"] == "firing"
        }

    def rules(self) -> list[dict[str, Any]]:
        """Every rule, with its state."""
        return [rule for group in self.get("rules")["groups"] for rule in group["rules"]]


@contextmanager
def running_prometheus(folder: Path, *, scale: float, **config: Any) -> Iterator[Prometheus]:
    """Prometheus with our rules, stopped at the end.

    Args:
        folder: For its data.
        scale: Of the rules' windows.
        config: For `build_prometheus_config`.
    """
    binary = shutil.which("prometheus")
    if binary is None:
        pytest.skip("prometheus is not installed: apt install prometheus")
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "prometheus.yml", build_prometheus_config(alertmanager=None, **config))
    for name, content in build_rules(scale).items():
        _write(folder / name, content)
    port = find_port()
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [
                binary,
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        with httpx.Client(timeout=30) as client:
            prometheus = Prometheus(f"http://127.0.0.1:{port}", client)
            wait_for(lambda: process.poll() is not None or _is_ready(prometheus))
            assert process.poll() is None, (folder / "prometheus.log").read_text()
            yield prometheus
    finally:
        process.terminate()
        process.wait(30)


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(yaml.safe_dump(dict(content), sort_keys=False))


def _is_ready(prometheus: Prometheus) -> bool:
    try:
        return prometheus.client.get(f"{prometheus.url}/-/ready").status_code == 200
    except httpx.TransportError:
        return False
