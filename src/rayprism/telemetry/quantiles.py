"""What cumulative counts say of an interval: increases, buckets taken together, quantiles.

Buckets are a mapping of upper bounds to counts of everything at or below them, as a scrape gives
them; the last bound is infinite. None of it does any I/O.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

__all__ = ["find_increase", "find_quantile", "merge_buckets", "subtract_buckets"]

Buckets = Mapping[float, float]


def find_increase(earlier: float, later: float) -> float:
    """How much a counter grew.

    A counter never falls: where it did, it began again at 0, and all of it is new.

    Source: Prometheus, "Query functions", `increase` and `rate`, on resets.
    """
    return later - earlier if later >= earlier else later


def subtract_buckets(later: Buckets, earlier: Buckets) -> dict[float, float]:
    """What came between two scrapes of one histogram.

    Its buckets begin again together: where one of them fell, all of the later ones are new, also
    those that have grown over what they were.
    """
    if any(count < earlier.get(bound, 0.0) for bound, count in later.items()):
        return dict(later)
    return {bound: count - earlier.get(bound, 0.0) for bound, count in later.items()}


def merge_buckets(sets: Iterable[Buckets]) -> dict[float, float]:
    """The histogram of everything that several have counted: the sum, bound by bound."""
    merged: dict[float, float] = {}
    for buckets in sets:
        for bound, count in buckets.items():
            merged[bound] = merged.get(bound, 0.0) + count
    return merged


def find_quantile(share: float, buckets: Buckets) -> float | None:
    """The value below which a share of everything lies, as Prometheus estimates it.

    Values are taken to be spread evenly within a bucket; the first bucket begins at 0, where its
    bound is above that. Of the infinite bucket nothing is known but where it begins, so the highest
    finite bound is given. A bucket that holds less than one below it, as happens between two
    scrapes, is taken to hold as much.

    Args:
        share: Above 0, at most 1.
        buckets: In any order.

    Returns:
        None where nothing was counted, where there is no finite bucket, or no infinite one.

    Raises:
        ValueError: The share is not in that range.

    Source: Prometheus, "Query functions", `histogram_quantile` of classic histograms.
    """
    if not 0.0 < share <= 1.0:
        raise ValueError(f"a share is above 0 and at most 1; got {share!r}")
    bounds = sorted(buckets)
    if len(bounds) < 2 or not math.isinf(bounds[-1]):
        return None
    counts = _rising([buckets[bound] for bound in bounds])
    if not counts[-1] > 0.0:
        return None
    rank = share * counts[-1]
    index = next((at for at, count in enumerate(counts[:-1]) if count >= rank), None)
    if index is None:
        return bounds[-2]
    if index == 0 and bounds[0] <= 0.0:
        return bounds[0]
    below, lower = (counts[index - 1], bounds[index - 1]) if index else (0.0, 0.0)
    within = (rank - below) / (counts[index] - below)
    return lower + (bounds[index] - lower) * within


def _rising(counts: Iterable[float]) -> list[float]:
    risen: list[float] = []
    for count in counts:
        risen.append(max(count, risen[-1]) if risen else count)
    return risen
