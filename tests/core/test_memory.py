"""Batches where memory has run out: halved at once, larger again by and by."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from rayprism.core.batching import BatchLimits
from rayprism.core.memory import MemoryLimit

ROWS = BatchLimits(max_rows=64, max_queue_rows=1000)
TOKENS = BatchLimits(max_rows=64, max_queue_rows=1000, max_cost=4096)
MINUTE = 60.0


def test_nothing_is_bounded_before_memory_has_run_out() -> None:
    memory = MemoryLimit(ragged=False)
    assert memory.cost is None
    assert memory.bound(ROWS) is ROWS
    assert memory.share(ROWS) == 1.0
    assert not memory.ran(ROWS, 1e9)


def test_a_batch_that_does_not_fit_halves_the_limit() -> None:
    memory = MemoryLimit(ragged=False)
    assert memory.ran_out(64, 0.0)
    assert memory.bound(ROWS).max_rows == 32
    assert memory.share(ROWS) == 0.5
    assert memory.ran_out(32, 1.0)
    assert memory.bound(ROWS).max_rows == 16
    assert memory.bound(ROWS).max_queue_rows == ROWS.max_queue_rows
    assert memory.bound(BatchLimits(8, 1000)).max_rows == 8, "what is configured stays a bound"


def test_ragged_models_are_bounded_by_their_cost() -> None:
    memory = MemoryLimit(ragged=True)
    assert memory.ran_out(3000, 0.0)
    assert memory.bound(TOKENS).max_cost == 1500
    assert memory.bound(TOKENS).max_rows == 64
    assert memory.bound(ROWS).max_cost == 1500, "also where no cost is configured"
    assert memory.bound(BatchLimits(64, 1000, max_cost=1000)).max_cost == 1000


def test_what_was_known_to_be_too_large_says_nothing_new() -> None:
    memory = MemoryLimit(ragged=False)
    memory.ran_out(64, 0.0)
    memory.ran_out(32, 0.0)
    assert not memory.ran_out(64, 1.0), "it was cut before the limit was lowered"
    assert memory.cost == 16
    # Nor does it put off that the limit rises again.
    assert memory.ran(ROWS, MINUTE)


def test_the_limit_rises_by_an_eighth_each_minute_until_it_is_gone() -> None:
    memory = MemoryLimit(ragged=False)
    memory.ran_out(64, 0.0)
    limits, now_s = [], 0.0
    assert not memory.ran(ROWS, 0.9 * MINUTE)
    while memory.cost is not None:
        now_s += MINUTE
        assert memory.ran(ROWS, now_s)
        assert not memory.ran(ROWS, now_s + 1), "once a minute"
        limits.append(memory.cost)
    assert limits == [36, 40, 45, 50, 56, 63, None]
    assert memory.bound(ROWS) is ROWS


def test_a_limit_of_one_rises_as_well() -> None:
    memory = MemoryLimit(ragged=False)
    memory.ran_out(2, 0.0)
    assert memory.cost == 1
    memory.ran(ROWS, MINUTE)
    assert memory.cost == 2


def test_a_rise_that_was_too_much_is_taken_back_and_waits_twice_as_long() -> None:
    memory = MemoryLimit(ragged=False)
    memory.ran_out(64, 0.0)
    now_s = 0.0
    for wait_s in (MINUTE, 2 * MINUTE, 4 * MINUTE, 8 * MINUTE):
        assert not memory.ran(ROWS, now_s + wait_s - 1)
        now_s += wait_s
        assert memory.ran(ROWS, now_s)
        assert memory.cost == 36
        assert memory.ran_out(35, now_s)
        assert memory.cost == 32, "not halved: 32 had been well"
    for _ in range(10):
        now_s += 3600.0
        assert memory.ran(ROWS, now_s), "it waits an hour at most"
        memory.ran_out(36, now_s)


def test_without_a_configured_cost_it_is_gone_where_it_began() -> None:
    memory = MemoryLimit(ragged=True)
    memory.ran_out(1000, 0.0)
    assert memory.share(ROWS) == 0.5
    now_s = 0.0
    while memory.cost is not None:
        now_s += MINUTE
        memory.ran(ROWS, now_s)
    assert now_s < 10 * MINUTE
    memory.ran_out(1000, now_s)
    assert memory.cost is not None
    assert memory.cost < 1000


@settings(max_examples=25)
@given(capacity=st.integers(1, 63), period_s=st.sampled_from([0.5, 7.0, 90.0]))
def test_half_a_day_of_full_batches_fails_seldom_and_ends_near_what_fits(
    capacity: int, period_s: float
) -> None:
    """Whatever fits, and however often a batch comes."""
    hours = 12
    memory = MemoryLimit(ragged=False)
    now_s, failures, next_s = 0.0, 0, 0.0
    while now_s < hours * 3600:
        rows = memory.bound(ROWS).max_rows
        if rows > capacity and rows > 1:
            failures += 1
            assert memory.ran_out(rows, now_s)
        elif memory.cost is not None:
            # Nothing happens between two rises: the time in between need not be played.
            now_s = max(now_s, next_s)
            if memory.ran(ROWS, now_s):
                next_s = now_s + MINUTE - period_s
        now_s += period_s
        assert memory.cost is None or memory.cost >= 1
    assert memory.bound(ROWS).max_rows >= capacity / 2
    assert failures <= 6 + 10 + hours, "to get there, to find the wait, and then once an hour"
