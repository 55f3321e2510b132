"""What rayprism's replicas counted during a load: sizes of batches, and times by stage."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from rayprism.fleet.metrics import Labels, MetricsReader, Sample
from rayprism.telemetry.catalogue import STAGES, find_metric
from rayprism.telemetry.quantiles import find_quantile, merge_buckets, subtract_buckets

__all__ = ["INTERVAL_S", "Counts", "ReplicaReader", "counts_in", "difference"]

INTERVAL_S = 1.0
"""Between two times that a replica of a benchmark sends what it has counted."""

_SLACK_S = 0.3
_LONGEST_S = 8.0
_BATCH_ROWS = find_metric("rayprism_batch_rows").exported
_STAGE_SECONDS = {stage: find_metric(f"rayprism_{stage}_seconds").exported for stage in STAGES}
_HISTOGRAMS = (_BATCH_ROWS, *_STAGE_SECONDS.values())
_NAMES = frozenset(f"{name}_{part}" for name in _HISTOGRAMS for part in ("bucket", "sum", "count"))


@dataclass(frozen=True)
class Counts:
    """What all replicas of a model have counted since their cluster started.

    Args:
        buckets: By histogram: upper bounds with counts of everything at or below them.
        sums: By histogram.
    """

    buckets: Mapping[str, Mapping[float, float]]
    sums: Mapping[str, float]


def counts_in(sample: Sample, model: str) -> Counts:
    """Adds up what nodes say of a model, over nodes and versions."""
    buckets: dict[str, dict[float, float]] = {}
    sums: dict[str, float] = {}
    for node in sample.nodes.values():
        for name in _HISTOGRAMS:
            for _, value in _of_model(node.series.get(f"{name}_sum", {}), model):
                sums[name] = sums.get(name, 0.0) + value
            for labels, value in _of_model(node.series.get(f"{name}_bucket", {}), model):
                bound = {float(labels["le"]): value}
                buckets[name] = merge_buckets([buckets.get(name, {}), bound])
    return Counts(buckets, sums)


def _of_model(series: Mapping[Labels, float], model: str) -> list[tuple[dict[str, str], float]]:
    found = [(dict(labels), value) for labels, value in series.items()]
    return [(labels, value) for labels, value in found if labels.get("model") == model]


def difference(before: Counts, after: Counts) -> dict[str, Any]:
    """What came between two times.

    Returns:
        `batches`; `batch_rows`, batches by the upper bound of their rows (`more` above the
        last); `stages_s`, of each stage that did anything `mean`, `p50` and `p99`, the last two as
        exact as the histogram's buckets.
    """
    grown = {
        name: subtract_buckets(later, before.buckets.get(name, {}))
        for name, later in after.buckets.items()
    }
    sizes: dict[str, int] = {}
    below = 0.0
    for bound, count in sorted(grown.get(_BATCH_ROWS, {}).items()):
        sizes["more" if math.isinf(bound) else f"{bound:g}"] = round(count - below)
        below = count
    stages = {}
    for stage, name in _STAGE_SECONDS.items():
        count = max(grown.get(name, {}).values(), default=0.0)
        if count > 0.0:
            added_s = after.sums.get(name, 0.0) - before.sums.get(name, 0.0)
            stages[stage] = {
                "mean": added_s / count,
                "p50": find_quantile(0.5, grown[name]),
                "p99": find_quantile(0.99, grown[name]),
            }
    return {
        "batches": sum(sizes.values()),
        "batch_rows": {size: count for size, count in sizes.items() if count},
        "stages_s": stages,
    }


class ReplicaReader:
    """Reads the counts of a model's replicas where Prometheus would.

    Replicas send them every second: `read` waits until nothing more comes, so it is for times at
    which nobody asks the server. What is between two readings holds the warm-up of a load, too.

    Args:
        scrape: What the cluster's nodes say now.
        model: Its name.
        sleep: Waits.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        scrape: Callable[[], Sample],
        model: str,
        *,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._scrape = scrape
        self._model = model
        self._sleep = sleep
        self._clock = clock

    @classmethod
    def at(cls, dashboard: str, model: str) -> Self:
        """Reads a model of the cluster with this dashboard, `http://host:port`."""
        return cls(MetricsReader(_NAMES, dashboard).read, model)

    def read(self) -> Counts:
        """The counts, once they stand still.

        Raises:
            ClusterError: The cluster's dashboard does not answer.
        """
        deadline_s = self._clock() + _LONGEST_S
        counts = counts_in(self._scrape(), self._model)
        while self._clock() < deadline_s:
            self._sleep(INTERVAL_S + _SLACK_S)
            again = counts_in(self._scrape(), self._model)
            if again == counts:
                break
            counts = again
        return counts
