from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.bootstrap import interval, ratio_interval

ROUNDS = [101.0, 97.0, 103.0, 99.0, 100.0]

numbers = st.floats(0.01, 1e6)


def medians_of_all_resamples(values: list[float]) -> np.ndarray:
    """Every resample there is, each as likely as the others."""
    return np.median(list(itertools.product(values, repeat=len(values))), axis=1)


@pytest.mark.parametrize("level", [0.5, 0.8, 0.95])
def test_the_interval_is_that_of_all_resamples(level: float) -> None:
    every = medians_of_all_resamples(ROUNDS)
    low, high = interval(ROUNDS, seed=3, level=level)
    for end, share in ((low, (1 - level) / 2), (high, (1 + level) / 2)):
        # Where the exact quantile lies on a step, the drawn one may be on either side of it.
        nearby = np.quantile(every, [share - 0.02, share + 0.02], method="inverted_cdf")
        assert nearby[0] <= end <= nearby[1]


def test_the_ratio_of_medians_resamples_each_side_for_itself() -> None:
    above, below = [10.0, 20.0, 30.0], [1.0, 2.0, 4.0]
    tops, bottoms = medians_of_all_resamples(above), medians_of_all_resamples(below)
    every = (tops[:, None] / bottoms[None, :]).ravel()
    found = ratio_interval(above, below, seed=1, paired=False, level=0.8)
    assert found == tuple(np.quantile(every, [0.1, 0.9], method="inverted_cdf"))


def test_pairs_keep_out_what_slowed_both() -> None:
    below = [100.0, 50.0, 200.0, 80.0, 120.0]
    above = [value * 1.5 for value in below]
    assert ratio_interval(above, below, seed=1, paired=True) == pytest.approx((1.5, 1.5))
    low, high = ratio_interval(above, below, seed=1, paired=False)
    assert low < 1 < high


def test_a_seed_gives_the_same_interval_again() -> None:
    values = list(np.random.default_rng(1).normal(100, 5, 12))
    assert interval(values, 7, np.mean) == interval(values, 7, np.mean)
    assert interval(values, 7, np.mean) != interval(values, 8, np.mean)


def test_more_of_the_same_rounds_narrow_it() -> None:
    few, many = interval(ROUNDS, seed=1), interval(ROUNDS * 8, seed=1)
    assert many[1] - many[0] < few[1] - few[0]


def test_another_statistic() -> None:
    assert interval([1.0, 1.0, 1.0, 5.0], seed=1, statistic=np.mean)[1] > 2
    assert interval([4.0], seed=1) == (4.0, 4.0)


@given(st.lists(numbers, min_size=1, max_size=9), st.integers(0, 5))
def test_it_stays_among_the_values_and_holds_the_median(values: list[float], seed: int) -> None:
    low, high = interval(values, seed)
    assert min(values) <= low <= np.median(values) <= high <= max(values)


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=7), st.floats(0.1, 10))
def test_a_factor_goes_through_a_ratio(pairs: list[tuple[float, float]], factor: float) -> None:
    above, below = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    for paired in (True, False):
        plain = ratio_interval(above, below, 1, paired)
        scaled = ratio_interval([factor * value for value in above], below, 1, paired)
        assert scaled == pytest.approx([factor * end for end in plain])


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_values_that_say_nothing_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="values has"):
        interval(values, seed=1)


def test_what_makes_no_ratio_is_refused() -> None:
    with pytest.raises(ValueError, match="only what is greater than 0 divides"):
        ratio_interval([1.0], [0.0], 1, paired=False)
    with pytest.raises(ValueError, match="make no pairs"):
        ratio_interval([1.0, 2.0], [1.0], 1, paired=True)
    with pytest.raises(ValueError, match="a share between 0 and 1"):
        interval([1.0], 1, level=95)
