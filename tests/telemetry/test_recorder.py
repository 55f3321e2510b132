"""Differences add up to what was recorded, and nothing else can be recorded."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayprism.telemetry.catalogue import exported_names, find_metric
from rayprism.telemetry.recorder import Point, Recorder

HISTOGRAM = "rayprism_compute_seconds"
BUCKETS = find_metric(HISTOGRAM).buckets

seconds = st.floats(0, 1e6, allow_nan=False)


def recorder() -> Recorder:
    return Recorder(model="flights", version="2", replica="r1")


def total(takes: Sequence[Sequence[Point]], name: str) -> Counter[str]:
    """Sums by the last label's value."""
    sums: Counter[str] = Counter()
    for points in takes:
        for point in points:
            if point.name == name:
                sums[point.labels[-1][1]] += point.value  # type: ignore[assignment]
    return sums


@given(st.lists(st.lists(st.integers(0, 1000))))
def test_takes_of_a_counter_add_up(rounds: list[list[int]]) -> None:
    source = recorder()
    count = source.count("rayprism_rows_total")
    takes = [source.take()]
    for added in rounds:
        for value in added:
            count.add(value)
        takes.append(source.take())
    assert total(takes, "rayprism_rows_total")["2"] == sum(map(sum, rounds)) == count.value


@given(st.lists(st.lists(seconds)))
def test_takes_of_a_histogram_add_up(rounds: list[list[float]]) -> None:
    source = recorder()
    histogram = source.histogram(HISTOGRAM)
    takes = [source.take()]
    for values in rounds:
        for value in values:
            histogram.observe(value)
        takes.append(source.take())
    every = [value for values in rounds for value in values]
    buckets = total(takes, f"{HISTOGRAM}_bucket")
    # Cumulative, as Prometheus has them: each bound with all that is not above it.
    for bound in BUCKETS:
        assert buckets[repr(bound)] == sum(value <= bound for value in every)
    assert buckets["+Inf"] == len(every)
    assert total(takes, f"{HISTOGRAM}_count")["2"] == len(every)
    assert math.isclose(total(takes, f"{HISTOGRAM}_sum")["2"], math.fsum(every), abs_tol=1e-6)


@given(seconds)
def test_a_value_on_a_bound_is_in_its_bucket(value: float) -> None:
    histogram = recorder().histogram(HISTOGRAM)
    histogram.observe(value)
    assert histogram.counts[bisect_left(BUCKETS, value)] == 1


def test_series_begin_at_zero_and_are_silent_when_nothing_came() -> None:
    source = recorder()
    count = source.count("rayprism_rows_total")
    histogram = source.histogram(HISTOGRAM)
    first = source.take()
    assert {point.value for point in first} == {0.0}
    assert len(first) == 1 + len(BUCKETS) + 3
    assert source.take() == []
    count.add(0)
    assert source.take() == []
    histogram.observe(0.0)
    assert [point.name for point in source.take()][-2:] == [
        f"{HISTOGRAM}_count",
        f"{HISTOGRAM}_sum",
    ]


def test_the_same_series_is_the_same_object() -> None:
    source = recorder()
    first = source.count("rayprism_fallbacks_total", reason="overloaded")
    assert source.count("rayprism_fallbacks_total", reason="overloaded") is first
    assert source.count("rayprism_fallbacks_total", reason="internal") is not first
    assert source.histogram(HISTOGRAM) is source.histogram(HISTOGRAM)


def test_labels_come_in_the_catalogues_order_and_may_be_said_anew() -> None:
    source = recorder()
    source.count("rayprism_requests_total", reason="ok", outcome="ok", source="client",
                 protocol="http", version="3")  # fmt: skip
    (point,) = source.take()
    assert point.labels == (
        ("model", "flights"),
        ("version", "3"),
        ("protocol", "http"),
        ("source", "client"),
        ("outcome", "ok"),
        ("reason", "ok"),
    )


def test_gauges_are_asked_each_time_and_may_be_silent() -> None:
    source = recorder()
    values: list[float | None] = [3, None, 0]
    source.gauge("rayprism_queue_rows", lambda: values.pop(0))
    labels = (("model", "flights"), ("version", "2"), ("replica", "r1"))
    assert source.take() == [Point("rayprism_queue_rows", "gauge", labels, 3.0)]
    assert source.take() == []
    assert [point.value for point in source.take()] == [0.0]
    source.gauge("rayprism_queue_rows", lambda: 7)
    assert [point.value for point in source.take()] == [7.0], "the second takes its place"


def test_what_is_counted_elsewhere_comes_before_each_take() -> None:
    source = recorder()
    count = source.count("rayprism_rows_total")
    source.before_each(lambda: count.add(5))
    assert [source.take()[0].value for _ in range(2)] == [5.0, 5.0]


def test_every_point_is_of_an_exported_name() -> None:
    source = recorder()
    source.count("rayprism_rows_total")
    source.histogram("rayprism_batch_rows")
    source.gauge("rayprism_queue_rows", lambda: 1)
    assert {f"ray_{point.name}" for point in source.take()} <= exported_names()


@pytest.mark.parametrize(
    ("name", "labels", "error"),
    [
        ("rayprism_no_such_total", {}, KeyError),
        (HISTOGRAM, {}, ValueError),
        ("rayprism_queue_rows", {}, ValueError),
        ("rayprism_fallbacks_total", {}, ValueError),
        ("rayprism_rows_total", {"reason": "ok"}, ValueError),
        ("rayprism_rows_total", {"client": "10.0.0.1"}, ValueError),
    ],
)
def test_what_is_not_in_the_catalogue_is_refused(
    name: str, labels: dict[str, str], error: type[Exception]
) -> None:
    with pytest.raises(error, match="rayprism"):
        recorder().count(name, **labels)


def test_kinds_are_not_mixed_up() -> None:
    source = recorder()
    with pytest.raises(ValueError, match="is a counter, not a histogram"):
        source.histogram("rayprism_rows_total")
    with pytest.raises(ValueError, match="is a counter, not a gauge"):
        source.gauge("rayprism_rows_total", lambda: 1)
    assert source.take() == []
