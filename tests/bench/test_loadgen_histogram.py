from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.loadgen import histogram
from bench.loadgen.histogram import FIGURES, decode, encode, figures, merge, percentile_of

LATENCIES = st.lists(st.floats(1e-6, 100.0), min_size=1, max_size=300)


def test_percentiles_are_measured_values() -> None:
    found = figures(np.arange(1000, 0, -1) / 1e3)
    assert found == {
        "mean": pytest.approx(0.5005),
        "min": 0.001,
        "p25": 0.25,
        "p50": 0.5,
        "p75": 0.75,
        "p90": 0.9,
        "p95": 0.95,
        "p99": 0.99,
        "p999": 0.999,
        "p9999": 1.0,
        "max": 1.0,
    }


@given(LATENCIES)
def test_a_percentile_is_the_least_that_so_many_did_not_exceed(latencies: list[float]) -> None:
    found = figures(latencies)
    for name, point in histogram.POINTS.items():
        value = found[name]
        assert value in latencies
        # As a ratio of whole numbers: 99.99 % of n is exact.
        needed = math.ceil(round(point * 100) * len(latencies) / 10_000)
        assert sum(latency <= value for latency in latencies) >= needed
        assert sum(latency < value for latency in latencies) < needed


@given(LATENCIES)
def test_counts_are_as_good_as_repetitions(latencies: list[float]) -> None:
    values, counts = np.unique(latencies, return_counts=True)
    assert figures(values, counts) == pytest.approx(figures(latencies))
    assert encode(values, counts) == encode(latencies)


def test_of_nothing_there_are_no_figures() -> None:
    assert figures([]) == dict.fromkeys(FIGURES)
    assert decode(encode([])).get_total_count() == 0


@settings(max_examples=30)
@given(LATENCIES)
def test_a_histogram_has_the_same_percentiles_to_three_digits(latencies: list[float]) -> None:
    decoded = decode(encode(latencies))
    assert decoded.get_total_count() == len(latencies)
    ordered = sorted(latencies)
    for point in (50.0, 90.0, 99.0, 100.0):
        # HdrHistogram rounds the rank to the nearest.
        exact = ordered[max(1, int(point * len(ordered) / 100 + 0.5)) - 1]
        assert percentile_of(decoded, point) == pytest.approx(exact, rel=1e-3, abs=1e-6)


@settings(max_examples=15)
@given(LATENCIES, LATENCIES)
def test_merged_is_as_if_recorded_together(first: list[float], second: list[float]) -> None:
    merged, together = (
        decode(merge([encode(first), encode(second)])),
        decode(encode(first + second)),
    )
    assert merged.get_total_count() == len(first) + len(second)
    for point in (0.0, 50.0, 99.0):
        assert percentile_of(merged, point) == percentile_of(together, point)


def test_what_is_outside_counts_as_the_least_or_the_greatest() -> None:
    decoded = decode(encode([0.0, 500.0]))
    assert decoded.get_total_count() == 2
    assert percentile_of(decoded, 50.0) == pytest.approx(1e-6)
    assert percentile_of(decoded, 100.0) == pytest.approx(120.0, rel=1e-3)
