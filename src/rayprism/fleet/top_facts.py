"""Samples of metrics, added up over nodes and over an interval. Does no I/O."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise

from rayprism.fleet.metrics import Labels, NodeSample, Sample
from rayprism.telemetry.quantiles import find_increase, merge_buckets, subtract_buckets

__all__ = ["VERSION", "Facts", "Key", "key_of", "ratio"]

Key = tuple[str, ...]
"""Values of some labels."""

VERSION = ("model", "version")


Values = list[tuple[Labels, float]]


class Facts:
    """What samples say, added up over nodes.

    Nodes that did not answer the last time are left out, also of what was before: their numbers
    would stand still.

    Args:
        samples: At least one; oldest first.
        counters: Names of the series that only grow.
        buckets: Name of the series of a histogram's buckets.
        told: Whether rates are.
    """

    def __init__(
        self, samples: Sequence[Sample], counters: Iterable[str], buckets: str, *, told: bool
    ) -> None:
        self.has_nodes = bool(samples[-1].nodes)
        self._told = told
        self._now: dict[str, Values] = {}
        self._added: dict[str, Values] = {}
        self._rates: dict[str, Values] = {}
        self._buckets: dict[Key, dict[float, float]] = {}
        for address, node in samples[-1].nodes.items():
            for name, values in node.series.items():
                self._now.setdefault(name, []).extend(values.items())
            seen = [sample.nodes[address] for sample in samples if address in sample.nodes]
            for name in counters:
                self._add_counter(name, seen)
            self._add_buckets(buckets, seen)

    def _add_counter(self, name: str, seen: Sequence[NodeSample]) -> None:
        added: dict[Labels, float] = {}
        for earlier, later in pairwise(seen):
            before = earlier.series.get(name, {})
            for labels, value in later.series.get(name, {}).items():
                # An agent that has not told of something before counts it from 0.
                increase = find_increase(before.get(labels, 0.0), value)
                added[labels] = added.get(labels, 0.0) + increase
        span_s = seen[-1].at_s - seen[0].at_s
        self._added.setdefault(name, []).extend(added.items())
        self._rates.setdefault(name, []).extend(
            (labels, value / span_s) for labels, value in added.items() if span_s > 0.0
        )

    def _add_buckets(self, name: str, seen: Sequence[NodeSample]) -> None:
        for earlier, later in pairwise(seen):
            before = _bucket_sets(earlier.series.get(name, {}))
            for key, buckets in _bucket_sets(later.series.get(name, {})).items():
                grown = subtract_buckets(buckets, before.get(key, {}))
                self._buckets[key] = merge_buckets([self._buckets.get(key, {}), grown])

    def now(self, name: str) -> Values:
        """Every series of that name, as it is now."""
        return self._now.get(name, [])

    def buckets(self, key: Key) -> Mapping[float, float]:
        """What came in the interval of a model's version."""
        return self._buckets.get(key, {})

    def value(self, name: str, **labels: str) -> float:
        """The sum now."""
        return sum(_choose(self.now(name), labels))

    def values(self, name: str, **labels: str) -> list[float]:
        """Of each series now."""
        return _choose(self.now(name), labels)

    def added(self, name: str, **labels: str) -> float:
        """What came in the interval."""
        return sum(_choose(self._added.get(name, ()), labels))

    def rate(self, name: str, **labels: str) -> float | None:
        """What came in a second; None where that is not told yet."""
        return sum(_choose(self._rates.get(name, ()), labels)) if self._told else None

    def mean(self, name: str, **labels: str) -> float | None:
        """Of what a histogram was given in the interval."""
        return ratio(self.added(f"{name}_sum", **labels), self.added(f"{name}_count", **labels))

    def keys_now(self, name: str, by: Sequence[str], **labels: str) -> set[Key]:
        """Values of labels that a gauge has now, where it is not 0."""
        return _find_keys(self.now(name), by, labels)

    def keys_added(self, names: Iterable[str], by: Sequence[str]) -> set[Key]:
        """Values of labels of which something was counted in the interval."""
        found: set[Key] = set()
        return found.union(*(_find_keys(self._added.get(name, ()), by, {}) for name in names))


def key_of(labels: Labels, by: Sequence[str]) -> Key:
    """The values of some labels; empty for those that are not there."""
    of = dict(labels)
    return tuple(of.get(label, "") for label in by)


def ratio(part: float, whole: float) -> float | None:
    """None of nothing."""
    return part / whole if whole > 0.0 else None


def _choose(series: Iterable[tuple[Labels, float]], labels: Mapping[str, str]) -> list[float]:
    wanted = set(labels.items())
    return [value for have, value in series if wanted.issubset(have)]


def _find_keys(
    series: Iterable[tuple[Labels, float]], by: Sequence[str], where: Mapping[str, str]
) -> set[Key]:
    wanted = set(where.items())
    keys = {key_of(labels, by) for labels, value in series if value and wanted.issubset(labels)}
    # Where a node has too many series, OpenTelemetry lumps the rest together without labels.
    return {key for key in keys if all(key)}


def _bucket_sets(series: Mapping[Labels, float]) -> dict[Key, dict[float, float]]:
    sets: dict[Key, dict[float, float]] = {}
    for labels, value in series.items():
        key, bound = _split_bucket(labels)
        if bound is not None:
            sets.setdefault(key, {})[bound] = value
    return sets


@lru_cache(maxsize=50_000)
def _split_bucket(labels: Labels) -> tuple[Key, float | None]:
    bound = dict(labels).get("le")
    return key_of(labels, VERSION), None if bound is None else float(bound)
