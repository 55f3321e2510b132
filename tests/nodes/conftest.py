"""Clusters of many nodes: real Ray nodes on machines made of namespaces. `make test-cluster`."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from rayprism.models.push import push_model
from rayprism.models.repository import Repository
from tests.nodes.machines import connect_network, is_inside
from tests.support.load import Load
from tests.support.models import mlp_example, save_mlp


@dataclass(frozen=True, slots=True)
class Figure:
    """What one event did to clients."""

    event: str
    sent: int
    failed: int
    slowest_s: float | None
    """Of a job there is none."""
    recovered: str
    seconds: float


class Figures:
    """Collects what tests measured."""

    def __init__(self) -> None:
        self.found: list[Figure] = []

    def add(self, event: str, loads: list[Load], recovered: str, seconds: float) -> None:
        """Notes one event: what its clients saw, and how long until what was well again."""
        failed = sum(load.failures.total() for load in loads)
        sent = failed + sum(load.answered for load in loads)
        slowest_s = max(load.slowest_s for load in loads)
        self.found.append(Figure(event, sent, failed, slowest_s, recovered, seconds))

    def add_job(self, event: str, rows: int, *, calm: float, disturbed: float) -> None:
        """Notes a batch job: no row is lost, or its test fails."""
        self.found.append(
            Figure(event, rows, 0, None, f"done; undisturbed {calm:.1f} s", disturbed)
        )

    def table(self) -> str:
        """In Markdown."""
        head = "| event | requests or rows | failed | slowest | until | |\n"
        rows = [
            f"| {figure.event} | {figure.sent:,} | {figure.failed} | {_seconds(figure.slowest_s)} "
            f"| {figure.recovered} | {_seconds(figure.seconds)} |\n"
            for figure in self.found
        ]
        return head + "| --- | ---: | ---: | ---: | --- | ---: |\n" + "".join(rows)


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} s"


_figures = Figures()


@pytest.fixture(scope="session")
def figures() -> Figures:
    return _figures


@pytest.fixture(scope="session", autouse=True)
def network() -> None:
    if not is_inside():
        pytest.skip("needs namespaces of its own (unshare, of util-linux): make test-cluster")
    if shutil.which("ip") is None:
        pytest.skip("needs ip (apt install iproute2)")
    connect_network()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory, network: None) -> Path:
    """A repository with the model `tiny`, version 1."""
    folder = tmp_path_factory.mktemp("repository")
    repository = Repository(folder / "models")
    push_model(repository, "tiny", save_mlp(folder / "tiny.onnx"), example=mlp_example())
    return repository.root


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _figures.found:
        return
    terminalreporter.section("requests while nodes came and went")
    terminalreporter.write_line(_figures.table())
