"""What holds of every metric."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest

from rayprism.telemetry.catalogue import (
    CATALOGUE,
    EXPORT_PREFIX,
    LABELS,
    STAGES,
    Metric,
    exported_names,
    find_metric,
)

_UNITS = ("seconds", "bytes", "rows", "ratio", "info")
_COUNTED = ("requests", "fallbacks", "copies", "outputs", "loads", "refusals", "shards", "batches")
_BARE = ("rayprism_job_actors", "rayprism_job_shards_left")
"""Gauges that count things."""
_AGENT_KEEPS = 2000
"""Series of a metric, in the life of an agent."""

every_metric = pytest.mark.parametrize("metric", CATALOGUE, ids=lambda metric: metric.name)


@every_metric
def test_its_name_is_lower_case_and_ours(metric: Metric) -> None:
    assert re.fullmatch(r"rayprism(_[a-z0-9]+)+", metric.name)


@every_metric
def test_only_counters_end_in_total(metric: Metric) -> None:
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    assert not metric.name.endswith(("_bucket", "_count", "_sum"))


@every_metric
def test_its_name_says_the_unit(metric: Metric) -> None:
    noun = metric.name.removesuffix("_total").rpartition("_")[2]
    allowed = (*_UNITS, *_COUNTED, "cost", "padding") if metric.kind == "counter" else _UNITS
    assert noun in allowed or metric.name in _BARE


@every_metric
def test_its_labels_are_explained_and_each_is_once(metric: Metric) -> None:
    assert set(metric.labels) <= LABELS.keys()
    assert len(set(metric.labels)) == len(metric.labels)
    assert {"model", "version"} <= set(metric.labels)


@every_metric
def test_its_labels_are_none_that_prometheus_sets(metric: Metric) -> None:
    assert not {"job", "instance", "cluster", "le", "__name__"} & set(metric.labels)


@every_metric
def test_only_gauges_tell_replicas_apart(metric: Metric) -> None:
    # A replica has a new id each time, and the agent never forgets a series.
    assert "replica" not in metric.labels or metric.kind == "gauge"


@every_metric
def test_buckets_rise_and_only_histograms_have_them(metric: Metric) -> None:
    assert bool(metric.buckets) == (metric.kind == "histogram")
    assert list(metric.buckets) == sorted(set(metric.buckets))
    assert len(metric.buckets) * 60 < _AGENT_KEEPS, "room for sixty versions on a node"


@every_metric
def test_its_meaning_is_a_sentence(metric: Metric) -> None:
    assert not metric.meaning[0].islower()
    assert metric.meaning.endswith(".")
    assert "\n" not in metric.meaning


def test_each_is_there_once_and_is_found() -> None:
    assert len({metric.name for metric in CATALOGUE}) == len(CATALOGUE)
    assert all(find_metric(metric.name) is metric for metric in CATALOGUE)
    with pytest.raises(KeyError):
        find_metric("rayprism_nothing_total")


def test_each_label_is_used() -> None:
    assert {label for metric in CATALOGUE for label in metric.labels} == set(LABELS)


def test_each_stage_has_its_histogram() -> None:
    assert all(find_metric(f"rayprism_{stage}_seconds").kind == "histogram" for stage in STAGES)


def test_exported_names_are_what_prometheus_sees() -> None:
    names = exported_names()
    assert all(name.startswith(EXPORT_PREFIX) for name in names)
    assert {
        "ray_rayprism_requests_total",
        "ray_rayprism_request_seconds_bucket",
        "ray_rayprism_request_seconds_sum",
        "ray_rayprism_request_seconds_count",
        "ray_rayprism_queue_rows",
    } <= names
    assert "ray_rayprism_request_seconds" not in names
    histograms = sum(metric.kind == "histogram" for metric in CATALOGUE)
    assert len(names) == len(CATALOGUE) + 2 * histograms


def test_metrics_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        CATALOGUE[0].name = "other"  # type: ignore[misc]
    assert [field.name for field in fields(Metric)][:2] == ["name", "kind"]
