"""The files in serve_configs/ fit what the examples push."""

from __future__ import annotations

import warnings

import pytest

from rayprism.fleet.check import check_file
from tests.examples.conftest import Pushed
from tests.examples.scripts import ROOT

with warnings.catch_warnings():
    # Ray's own, while it is imported: not what these tests are about.
    warnings.simplefilter("ignore")
    import ray.serve.schema  # noqa: F401

FILES = sorted(path.name for path in (ROOT / "serve_configs").glob("*.yaml"))


def test_there_are_files() -> None:
    assert {"canary.yaml", "quickstart.yaml"} <= set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_file_is_right(name: str, flights: Pushed, digits: Pushed, minilm: Pushed) -> None:
    report = check_file(ROOT / "serve_configs" / name, repository=flights.repository.root)
    assert not report.faults
    # Before a cluster stands a load balancer, which reaches it from elsewhere.
    wanted = ["http_options.host"] if name == "cluster.yaml" else []
    assert [warning.path for warning in report.warnings] == wanted
    assert all(plan.digest for plan in report.applications if plan.model)
