"""What is made of the samples of `bench.parity`, and what its jobs are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.parity import JOBS, judge, render
from rayprism.offline.spec import parse_spec


def sample(*, agree: int = 95, not_sent: int = 5, **more: Any) -> dict[str, Any]:
    parity = {
        "rows": 100,
        "rows_done": 336_776,
        "agree": agree,
        "agrees": agree + not_sent == 100,
        "rows_together": 1,
        "letters": {"refused": 1, "answered": 0, "not_sent": not_sent},
        "tolerance": {"rule": "close"},
        "outputs": {
            "y": {"compared": 94, "agree": 94, "largest_absolute": 2.5e-8, "largest_relative": 0.0}
        },
    }
    return {"job": "flights-2", "data": "flights of 2013", "parity": {**parity, **more}}


def test_every_row_that_can_be_sent_has_to_agree() -> None:
    good, bad, empty = judge([sample(), sample(agree=94), sample(agree=0, not_sent=100)])
    assert (good["value"], good["met"]) == (0, True)
    assert (bad["value"], bad["met"]) == (1, False)
    assert (empty["value"], empty["met"]) == (None, False), "nothing compared shows nothing"


def test_the_report_has_a_row_for_each_output() -> None:
    samples = [sample(), sample(rows_together=32)]
    text = render(
        {
            "date": "2026-01-01T00:00:00+00:00",
            "machine": {"cores": 2, "cpu": "C", "memory_gib": 24.0},
            "versions": {"ray": "2.60.0", "onnxruntime": "1", "python": "3.11"},
            "commit": {"hash": "0123456789abcdef", "changed_since": False},
            "plan": {"sample": 100},
            "verdicts": judge(samples),
            "samples": samples,
        }
    )
    assert "| flights-2 `y`, one row a request | 336,776 | 94 | 94 | 2.5e-08 | 0 | close |" in text
    assert "flights-2 `y`, up to 32 rows a request" in text
    assert "**fail**" not in text


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_jobs_are_told_what_the_command_takes(job: Any, tmp_path: Path) -> None:
    spec = parse_spec(job.config(tmp_path, tmp_path / "models"))
    assert (spec.model, str(spec.version)) == (job.model, job.version)
    assert job.application(tmp_path)["args"]["version"] == int(spec.version)
