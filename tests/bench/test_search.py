"""The rates that a search tries, against servers whose limit is known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.search import RateSearch


def run(
    search: RateSearch, holds: Callable[[float, int], bool], *, sure: bool = False
) -> list[float]:
    """Runs a search to its end; `holds` is told the rate and how often it was tried before."""
    tried: list[float] = []
    for rate in search:
        held = holds(rate, tried.count(rate))
        tried.append(rate)
        search.tell(held=held, sure=sure and not held)
        assert len(tried) < 100, "it does not end"
    return tried


@given(
    limit=st.floats(1.0, 999.0),
    precision=st.sampled_from([0.02, 0.05, 0.1, 0.25]),
    guess=st.one_of(st.none(), st.floats(0.5, 2000.0)),
)
def test_it_finds_the_limit_to_the_precision(
    limit: float, precision: float, guess: float | None
) -> None:
    search = RateSearch(1, 1000, precision, guess)
    run(search, lambda rate, _: rate <= limit)
    assert search.found is not None
    assert search.at_most is not None
    assert search.found <= limit < search.at_most
    assert search.at_most / search.found <= 1 + precision + 1e-9


def test_it_grows_from_the_lowest_rate_then_halves_in_log_space() -> None:
    tried = run(RateSearch(10, 1000, 0.2), lambda rate, _: rate <= 45, sure=True)
    assert tried == pytest.approx([10, 20, 40, 80, 56.57, 47.57], rel=1e-3)


def test_a_failure_is_tried_again_and_one_hiccup_does_not_count() -> None:
    search = RateSearch(10, 1000, 0.1)
    tried = run(search, lambda rate, times: rate <= 300 and not (rate == 20 and times == 0))
    assert tried[:4] == [10, 20, 20, 40]
    assert search.found == pytest.approx(300, rel=0.1)


def test_a_failure_that_comes_twice_is_believed() -> None:
    search = RateSearch(10, 1000, 0.5)
    tried = run(search, lambda rate, _: rate <= 25)
    assert tried[:4] == [10, 20, 40, 40]
    assert search.at_most is not None
    assert search.at_most <= 40


def test_a_failure_that_is_sure_is_not_tried_again() -> None:
    tried = run(RateSearch(10, 1000, 0.05), lambda rate, _: rate <= 123, sure=True)
    assert len(tried) == len(set(tried))


def test_where_the_lowest_rate_fails_nothing_is_found() -> None:
    search = RateSearch(10, 1000, 0.1)
    assert run(search, lambda *_: False) == [10, 10]
    assert search.found is None
    assert search.at_most == 10


def test_where_the_highest_rate_holds_that_is_found_and_no_limit_is_known() -> None:
    search = RateSearch(10, 70, 0.1)
    assert run(search, lambda *_: True) == [10, 20, 40, 70]
    assert search.found == 70
    assert search.at_most is None


@pytest.mark.parametrize(("limit", "first"), [(105, [100, 120]), (90, [100, 100 / 1.2])])
def test_a_guess_is_where_it_begins(limit: float, first: list[float]) -> None:
    search = RateSearch(10, 1000, 0.05, guess=100)
    tried = run(search, lambda rate, _: rate <= limit, sure=True)
    assert tried[:2] == pytest.approx(first)
    assert len(tried) <= 5


def test_a_guess_that_is_far_too_high_still_ends_at_the_lowest_rate() -> None:
    search = RateSearch(10, 1000, 0.1, guess=5000)
    assert run(search, lambda *_: False, sure=True)[0] == 1000
    assert search.found is None
    assert search.at_most == 10


def test_asking_twice_gives_the_same_rate() -> None:
    search = RateSearch(10, 1000, 0.1)
    assert search.next_rate() == search.next_rate() == 10


def test_nothing_can_be_told_before_a_rate_is_asked_for() -> None:
    with pytest.raises(ValueError, match="next_rate first"):
        RateSearch(10, 1000, 0.1).tell(held=True)


@pytest.mark.parametrize(
    ("low", "high", "precision", "said"),
    [(0, 10, 0.1, "low"), (20, 10, 0.1, "low"), (1, 10, 0, "precision")],
)
def test_what_cannot_be_searched_is_refused(
    low: float, high: float, precision: float, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        RateSearch(low, high, precision)
