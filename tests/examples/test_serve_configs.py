"""The files in serve_configs/ fit what the examples push."""

from __future__ import annotations

import pytest

from rayprism.fleet.check import check_file
from tests.examples.conftest import Pushed
from tests.examples.scripts import ROOT


@pytest.mark.parametrize("name", ["quickstart", "digits", "minilm"])
def test_file_is_right(name: str, flights: Pushed, digits: Pushed, minilm: Pushed) -> None:
    report = check_file(ROOT / "serve_configs" / f"{name}.yaml", repository=flights.repository.root)
    assert not report.faults
    assert not report.warnings
    assert all(plan.digest for plan in report.applications if plan.model)
