"""Quantiles and differences of cumulative buckets, against simple oracles."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayprism.telemetry.catalogue import SECONDS
from rayprism.telemetry.quantiles import (
    find_increase,
    find_quantile,
    merge_buckets,
    subtract_buckets,
)

BOUNDS = (*SECONDS, math.inf)
values = st.lists(st.floats(0.0, 100.0), max_size=60)
shares = st.floats(0.001, 1.0)


def count(found: list[float]) -> dict[float, float]:
    return {bound: float(sum(value <= bound for value in found)) for bound in BOUNDS}


@given(values, shares)
def test_a_quantile_is_in_the_bucket_of_the_value_of_that_rank(found, share):
    quantile = find_quantile(share, count(found))
    if not found:
        assert quantile is None
        return
    exact = sorted(found)[max(0, math.ceil(share * len(found) - 1e-9) - 1)]
    if exact > SECONDS[-1]:
        assert quantile == SECONDS[-1]
        return
    low, high = next((a, b) for a, b in pairwise((0.0, *SECONDS)) if exact <= b)
    assert low - 1e-12 <= quantile <= high + 1e-12


@given(values.filter(bool), shares, shares)
def test_a_quantile_does_not_fall_as_its_share_rises(found, one, other):
    buckets = count(found)
    low, high = sorted((one, other))
    assert find_quantile(low, buckets) <= find_quantile(high, buckets) + 1e-12


@given(values.filter(bool), shares, st.floats(0.1, 1000.0))
def test_a_quantile_of_rates_is_that_of_counts(found, share, scale):
    """Rounding may choose the next bucket where the rank is exactly a bucket's end."""
    buckets = count(found)
    rank = share * len(found)
    if abs(rank - round(rank)) < 1e-6:
        return
    scaled = {bound: value * scale for bound, value in buckets.items()}
    assert find_quantile(share, scaled) == pytest.approx(find_quantile(share, buckets))


@pytest.mark.parametrize(
    ("share", "buckets", "quantile"),
    [
        # By hand, from Prometheus' definition.
        (0.5, {1.0: 10, 2.0: 20, math.inf: 20}, 1.0),
        (0.75, {1.0: 10, 2.0: 20, math.inf: 20}, 1.5),
        (0.25, {1.0: 10, 2.0: 20, math.inf: 20}, 0.5),
        (1.0, {1.0: 10, 2.0: 20, math.inf: 20}, 2.0),
        (0.99, {1.0: 10, 2.0: 20, math.inf: 40}, 2.0),
        (0.5, {0.0: 6, 0.5: 11, 1.0: 14, math.inf: 19}, 0.35),
        (0.1, {-1.0: 5, 1.0: 10, math.inf: 10}, -1.0),
        (0.5, {1.0: 10, 2.0: 5, math.inf: 10}, 0.5),
        (0.5, {1.0: 0, math.inf: 0}, None),
        (0.5, {1.0: 5}, None),
        (0.5, {1.0: 5, 2.0: 5}, None),
        (0.5, {math.inf: 5}, None),
        (0.5, {}, None),
    ],
)
def test_a_quantile_is_that_of_prometheus(share, buckets, quantile):
    assert find_quantile(share, buckets) == (quantile and pytest.approx(quantile))


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, math.nan])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ValueError, match="share"):
        find_quantile(share, {1.0: 1, math.inf: 1})


@given(values, values)
def test_what_came_between_two_scrapes(before, after):
    assert subtract_buckets(count(before + after), count(before)) == count(after)


@given(values, values)
def test_after_a_restart_all_is_new(before, after):
    earlier, later = count(before), count(after)
    grown = subtract_buckets(later, earlier)
    if any(later[bound] < earlier[bound] for bound in BOUNDS):
        assert grown == later
    assert all(value >= 0 for value in grown.values())


def test_all_buckets_begin_again_together():
    earlier = {1.0: 5.0, 2.0: 5.0, math.inf: 5.0}
    later = {1.0: 2.0, 2.0: 9.0, math.inf: 9.0}
    assert subtract_buckets(later, earlier) == later


@given(st.lists(values, max_size=4))
def test_merged_buckets_count_everything(nodes):
    everything = [value for found in nodes for value in found]
    merged = merge_buckets([count(found) for found in nodes])
    assert merged == (count(everything) if nodes else {})


@given(st.floats(0, 1e9), st.floats(0, 1e9))
def test_a_counter_that_fell_began_again(earlier, later):
    grown = find_increase(earlier, later)
    assert grown == (later - earlier if later >= earlier else later)
    assert grown >= 0
