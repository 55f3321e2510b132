"""What is made of the samples of `bench.traffic`."""

from __future__ import annotations

from typing import Any

import pytest

from bench.traffic import judge, summarise


def closed(case: str, turn: int, rate: float, **more: Any) -> dict[str, Any]:
    return {
        "loop": "closed",
        "case": case,
        "round": turn,
        "rate": rate,
        "requests": 1000,
        "errors": {},
        "forwarded": 0,
        "fallbacks": 0,
        "shadows_compared": 0,
        "shadows_dropped": 0,
        **more,
    }


def opened(case: str, turn: int, p99_s: float, **more: Any) -> dict[str, Any]:
    return {
        **closed(case, turn, 0.0, **more),
        "loop": "open",
        "latency_s": {"p50": 0, "p99": p99_s},
    }


def samples(**worse: Any) -> list[dict[str, Any]]:
    found = []
    # The machine is twice as slow in the second round, which the ratios must not show.
    for turn, speed in enumerate((1.0, 0.5, 1.0)):
        found += [
            closed("none", turn, 1000 * speed),
            closed("5 %", turn, 980 * speed, forwarded=50),
            closed("50 %", turn, 600 * speed, forwarded=500),
            closed("100 %", turn, 400 * speed, forwarded=1000),
            closed("shadow 10 %", turn, 900 * speed),
            opened("none", turn, 0.010 / speed),
            opened("5 %", turn, 0.010 / speed),
            opened("shadow 10 %", turn, 0.0105 / speed, shadows_compared=100, **worse),
        ]
    return found


def test_ratios_are_taken_within_rounds() -> None:
    rows = summarise(samples())
    assert rows["5 %"]["rate_ratio"] == pytest.approx(0.98)
    assert rows["50 %"]["forwarded_share"] == pytest.approx(0.5)
    assert rows["shadow 10 %"]["p99_ratio"] == pytest.approx(1.05)
    assert rows["shadow 10 %"]["shadows_compared"] == 300
    assert rows["50 %"]["p99_s"] is None, "not measured in an open loop"


def test_targets_are_judged() -> None:
    assert [verdict["met"] for verdict in judge(samples())] == [True, True, True]
    slow = [{**s, "rate": 500} if s["case"] == "5 %" else s for s in samples()]
    assert [verdict["met"] for verdict in judge(slow)] == [False, True, True]


def test_a_run_with_errors_meets_nothing() -> None:
    found = judge(samples(errors={"503": 1}))
    assert [verdict["met"] for verdict in found] == [True, True, False]
