"""How one rate of a search is judged, and what a whole search gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bench.loadgen.histogram import encode, figures
from bench.scenario import Search
from bench.trials import judge_trial, search_rate

SEARCH = Search(percentile=99, at_most_s=0.1, low=10, high=1000, precision=0.1)


def answered(
    latencies_s: list[float], failed: int = 0, limited: str | None = None
) -> dict[str, Any]:
    return {
        "requests": len(latencies_s) + failed,
        "ok": len(latencies_s),
        "latency_s": figures(latencies_s),
        "histogram": encode(latencies_s),
        "generator": {"limited": limited},
        "errors": {},
    }


def test_a_rate_that_holds() -> None:
    outcome = judge_trial(answered([0.01] * 98 + [0.1, 0.5]), SEARCH)
    assert outcome.held
    assert outcome.why is None
    assert outcome.p_s == pytest.approx(0.1)


def test_a_rate_whose_percentile_is_late() -> None:
    outcome = judge_trial(answered([0.01] * 98 + [0.11, 0.5]), SEARCH)
    assert not outcome.held
    assert outcome.why == "p99 was 110.0 ms"
    assert not outcome.sure, "it may have been a hiccup"


def test_half_of_the_answers_late_is_no_hiccup() -> None:
    assert judge_trial(answered([0.01] * 49 + [0.2] * 51), SEARCH).sure


def test_what_failed_counts_as_late() -> None:
    assert judge_trial(answered([0.01] * 99, failed=1), SEARCH).held
    outcome = judge_trial(answered([0.01] * 98, failed=2), SEARCH)
    assert not outcome.held
    assert outcome.why == "2 of 100 failed or were refused"


def test_nothing_answered_is_not_held() -> None:
    outcome = judge_trial(answered([], failed=5), SEARCH)
    assert (outcome.held, outcome.sure, outcome.p_s) == (False, True, None)


def test_a_rate_that_is_held_is_held_whatever_the_generator_did() -> None:
    assert judge_trial(answered([0.01] * 100, limited="a worker was busy"), SEARCH).held


def test_a_failure_that_may_be_the_generators_is_told() -> None:
    outcome = judge_trial(answered([0.2] * 100, limited="a worker was busy"), SEARCH)
    assert not outcome.held
    assert outcome.limited == "a worker was busy"
    assert judge_trial(answered([0.2] * 100), SEARCH).limited is None


def test_a_percentile_that_samples_do_not_have_comes_from_the_histogram() -> None:
    latencies = np.linspace(0.001, 1.0, 1000).tolist()
    search = SEARCH.model_copy(update={"percentile": 97.0})
    assert judge_trial(answered(latencies), search).p_s == pytest.approx(0.97, rel=1e-2)


class Bench:
    """A server that holds up to a limit, and what was done to it."""

    def __init__(self, limit: float, limited: str | None = None) -> None:
        self.limit = limit
        self.limited = limited
        self.said: list[str] = []
        self.done: list[str] = []

    def drive(self, rate: float, number: int) -> dict[str, Any]:
        self.done.append(f"drive {number}")
        if rate <= self.limit:
            return {**answered([0.01] * 100), "seen": rate}
        return {**answered([0.3] * 100, limited=self.limited), "seen": rate}

    def search(self, **more: Any) -> dict[str, Any]:
        return search_rate(
            SEARCH, self.drive, lambda: self.done.append("settle"), self.said.append, **more
        )


def test_a_search_gives_the_figures_of_the_rate_that_it_found() -> None:
    bench = Bench(100)
    found = bench.search()
    held = [step["rate"] for step in found["search"] if step["held"]]
    assert found["seen"] == max(held)
    assert 90 < max(held) <= 100
    assert all(step["why"] for step in found["search"] if not step["held"])
    assert len(bench.said) == len(found["search"])


def test_a_server_that_fell_behind_is_let_settle() -> None:
    bench = Bench(100)
    found = bench.search()
    expected = []
    for number, step in enumerate(found["search"]):
        expected += [f"drive {number}"] + ([] if step["held"] else ["settle"])
    assert bench.done == expected


def test_a_search_that_finds_nothing_gives_the_figures_of_its_last_try() -> None:
    found = Bench(1).search()
    assert found["seen"] == 10
    assert not any(step["held"] for step in found["search"])


def test_a_guess_saves_tries() -> None:
    assert len(Bench(100).search(guess=95)["search"]) < len(Bench(100).search()["search"])


def test_a_limit_that_was_the_generators_is_told_of_the_whole_search() -> None:
    found = Bench(100, limited="a worker was busy").search()
    assert found["generator"]["limited"] == "at a higher rate: a worker was busy"
    assert Bench(100).search()["generator"]["limited"] is None
