"""Ray's own code takes what is sent, finds the agent, and brings the cluster's token."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from ray.experimental import internal_kv

from rayprism.telemetry import ray_agent
from rayprism.telemetry.catalogue import CATALOGUE, LABELS, Metric, exported_names
from rayprism.telemetry.otlp import RequestBuilder
from rayprism.telemetry.recorder import Point, Recorder
from tests.telemetry.agent import run_agent

PROGRAM = Path(__file__).with_name("ray_ingestion.py")
KEPT = 2000
"""Series of a metric that the agent keeps."""

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def ingested(takes: Sequence[Sequence[Point]]) -> Samples:
    """What Prometheus would get of Ray's agent."""
    builder = RequestBuilder()
    lines = [base64.b64encode(builder.build(take).SerializeToString()) for take in takes]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(PROGRAM)],
        input=b"\n".join(lines),
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr.decode()
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["failed"] == []
    return {(name, frozenset(labels.items())): value for name, labels, value in told["samples"]}


def everything(recorder: Recorder) -> dict[str, Any]:
    """One series of each metric."""
    series: dict[str, Any] = {}
    for metric in CATALOGUE:
        labels = {label: f"a-{label}" for label in metric.labels}
        if metric.kind == "gauge":
            recorder.gauge(metric.name, lambda: 0.25, **labels)
        elif metric.kind == "counter":
            series[metric.name] = recorder.count(metric.name, **labels)
        else:
            series[metric.name] = recorder.histogram(metric.name, **labels)
    return series


def labels_of(metric: Metric, **more: str) -> frozenset[tuple[str, str]]:
    return frozenset({**{label: f"a-{label}" for label in metric.labels}, **more}.items())


@pytest.fixture(scope="module")
def samples() -> Samples:
    recorder = Recorder()
    series = everything(recorder)
    takes = [recorder.take()]
    for _ in range(2):
        for one in series.values():
            for value in (0.125, 0.75, 100_000):
                one.observe(value) if hasattr(one, "observe") else one.add(value)
        takes.append(recorder.take())
    return ingested(takes)


def test_rays_agent_exports_every_name_of_the_catalogue_and_no_other(samples: Samples) -> None:
    assert {name for name, _ in samples} == exported_names()


@pytest.mark.parametrize("metric", CATALOGUE, ids=lambda metric: metric.name)
def test_rays_agent_exports_exact_values_with_our_labels(metric: Metric, samples: Samples) -> None:
    labels = labels_of(metric)
    if metric.kind == "gauge":
        assert samples[metric.exported, labels] == 0.25
    elif metric.kind == "counter":
        assert samples[metric.exported, labels] == 2 * 100_000.875
    else:
        assert samples[f"{metric.exported}_sum", labels] == 2 * 100_000.875
        assert samples[f"{metric.exported}_count", labels] == 6
        buckets = {
            dict(key)["le"]: value
            for (name, key), value in samples.items()
            if name == f"{metric.exported}_bucket"
        }
        assert buckets == {
            **{
                repr(bound): 2.0 * sum(value <= bound for value in (0.125, 0.75, 100_000))
                for bound in metric.buckets
            },
            "+Inf": 6.0,
        }


def test_no_label_is_one_that_the_agent_adds(samples: Samples) -> None:
    assert {label for _, labels in samples for label, _ in labels} == {*LABELS, "le"}


def test_beyond_two_thousand_series_the_agent_adds_up_the_rest_in_one() -> None:
    points = [
        Point(
            "rayprism_rows_total", "counter", (("model", "flights"), ("version", str(index))), 1.0
        )
        for index in range(KEPT + 5)
    ]
    samples = ingested([points])
    assert len(samples) == KEPT + 1
    overflow = [key for key in samples if ("otel_metric_overflow", "true") in key[1]]
    assert len(overflow) == 1, "docs/metrics.md has an alert for this label"


# Where the agent is


class Context:
    def get_node_id(self) -> str:
        return "ab12"


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, bytes], bytes]:
    values: dict[tuple[str, bytes], bytes] = {}
    monkeypatch.setattr(ray_agent.ray, "get_runtime_context", Context)
    monkeypatch.setattr(
        internal_kv, "_internal_kv_get", lambda key, namespace: values.get((key, namespace))
    )
    return values


KEY = ("DASHBOARD_AGENT_ADDR_NODE_ID_PREFIX:ab12", b"dashboard")


def test_the_agent_is_where_it_has_registered(registered: dict[Any, bytes]) -> None:
    assert ray_agent.find_agent() is None, "not yet"
    registered[KEY] = b'["10.0.0.7", 52365, 44217]'
    assert ray_agent.find_agent() == "10.0.0.7:44217"
    registered[KEY] = b'["fd00::7", 52365, 44218]'
    assert ray_agent.find_agent() == "[fd00::7]:44218"
    registered[KEY] = b'["10.0.0.7", -1, -1]'
    assert ray_agent.find_agent() is None, "a Ray without its agent's server"


@pytest.mark.parametrize("mode", ["token", "disabled"])
def test_the_clusters_token_is_sent_where_it_has_one(mode: str) -> None:
    # Ray reads its mode once in a process.
    program = (
        "import sys\n"
        "from rayprism.telemetry.export import send_once\n"
        "from rayprism.telemetry.recorder import Point\n"
        "labels = (('model', 'flights'), ('version', '2'))\n"
        "point = Point('rayprism_rows_total', 'counter', labels, 1.0)\n"
        "sys.exit(not send_once([point], lambda: sys.argv[1], within_s=60))\n"
    )
    with run_agent() as agent:
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", program, agent.address],
            env={**os.environ, "RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN": "0123456789abcdef" * 2},
            check=True,
            timeout=120,
        )
        (metadata,) = agent.metadata
    expected = f"Bearer {'0123456789abcdef' * 2}" if mode == "token" else None
    assert metadata.get("authorization") == expected
