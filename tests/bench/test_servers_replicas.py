"""What replicas counted during a load, from scrapes as Ray's agents answer them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from bench.servers.replica_metrics import _NAMES, ReplicaReader, counts_in, difference
from rayprism.fleet.metrics import NodeSample, Sample, parse_metrics

WANTED = {name.encode() for name in _NAMES}


def histogram(name: str, model: str, version: str, sums: float, **buckets: int) -> str:
    """Buckets as `le_0_001=3`: the counts of everything at or below."""
    labels = f'model="{model}",version="{version}"'
    lines = [
        f'ray_{name}_bucket{{{labels},le="{bound}"}} {count}'
        for bound, count in (
            (key.removeprefix("le_").replace("_", ".").replace("inf", "+Inf"), count)
            for key, count in buckets.items()
        )
    ]
    count = list(buckets.values())[-1]
    return "\n".join(
        [
            *lines,
            f"ray_{name}_sum{{{labels}}} {sums}",
            f"ray_{name}_count{{{labels}}} {count}",
        ]
    )


def sample(*nodes: Sequence[str]) -> Sample:
    return Sample(
        0.0,
        {
            f"127.0.0.1:{port}": NodeSample(0.0, parse_metrics("\n".join(lines).encode(), WANTED))
            for port, lines in enumerate(nodes)
        },
        {},
    )


BATCHES = "rayprism_batch_rows"
COMPUTE = "rayprism_compute_seconds"


def test_difference_adds_up_nodes_and_versions_and_leaves_other_models_out() -> None:
    before = sample(
        [histogram(BATCHES, "tiny", "1", 4, le_1=2, le_2=3, le_inf=3)],
        [histogram(BATCHES, "other", "1", 100, le_1=50, le_2=50, le_inf=50)],
    )
    after = sample(
        [
            histogram(BATCHES, "tiny", "1", 10, le_1=4, le_2=6, le_inf=6),
            histogram(BATCHES, "tiny", "2", 7, le_1=1, le_2=1, le_inf=2),
        ],
        [
            histogram(BATCHES, "other", "1", 400, le_1=200, le_2=200, le_inf=200),
            histogram(BATCHES, "tiny", "1", 2, le_1=0, le_2=1, le_inf=1),
        ],
    )
    found = difference(counts_in(before, "tiny"), counts_in(after, "tiny"))
    assert found["batch_rows"] == {"1": 3, "2": 2, "more": 1}
    assert found["batches"] == 6


def test_stages_have_the_mean_and_quantiles_of_what_came_between() -> None:
    before = sample([histogram(COMPUTE, "tiny", "1", 5.0, le_0_001=0, le_0_1=100, le_inf=100)])
    after = sample([histogram(COMPUTE, "tiny", "1", 5.2, le_0_001=200, le_0_1=300, le_inf=300)])
    found = difference(counts_in(before, "tiny"), counts_in(after, "tiny"))
    compute = found["stages_s"].pop("compute")
    assert compute["mean"] == pytest.approx(0.001)
    assert compute["p50"] == pytest.approx(0.0005)
    assert compute["p99"] == pytest.approx(0.00099)
    # Nothing was forwarded, say: there is no stage.
    assert found["stages_s"] == {}
    assert found["batches"] == 0


def test_a_reading_waits_until_nothing_more_comes() -> None:
    counts = [1, 3, 6, 6, 100]
    scrapes = iter(
        sample([histogram(BATCHES, "tiny", "1", count, le_1=count, le_inf=count)])
        for count in counts
    )
    slept: list[float] = []
    reader = ReplicaReader(
        lambda: next(scrapes), "tiny", sleep=slept.append, clock=lambda: sum(slept)
    )
    assert max(reader.read().buckets["ray_rayprism_batch_rows"].values()) == 6
    # Longer than replicas pause between two times that they send.
    assert min(slept) > 1.0


def test_a_reading_ends_although_more_comes() -> None:
    asked: list[int] = []
    slept: list[float] = []

    def scrape() -> Sample:
        asked.append(1)
        count = len(asked)
        return sample([histogram(BATCHES, "tiny", "1", count, le_1=count, le_inf=count)])

    ReplicaReader(scrape, "tiny", sleep=slept.append, clock=lambda: sum(slept)).read()
    assert 5.0 < sum(slept) < 15.0
