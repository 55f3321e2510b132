"""Latencies as HdrHistograms, and their percentiles."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from hdrh.histogram import HdrHistogram
from numpy.typing import ArrayLike

__all__ = ["FIGURES", "POINTS", "decode", "encode", "figures", "merge", "percentile_of"]

POINTS = {
    "p25": 25.0,
    "p50": 50.0,
    "p75": 75.0,
    "p90": 90.0,
    "p95": 95.0,
    "p99": 99.0,
    "p999": 99.9,
    "p9999": 99.99,
}
FIGURES = ("mean", "min", *POINTS, "max")

_LOWEST_US, _HIGHEST_US, _DIGITS = 1, 120_000_000, 3


def figures(
    latencies_s: ArrayLike, counts: ArrayLike | None = None
) -> dict[str, float] | dict[str, None]:
    """Mean, least, greatest and percentiles, from the latencies themselves.

    A percentile is the least latency that so many percent of the requests did not exceed: one that
    was measured, with nothing interpolated.

    Args:
        latencies_s: In any order.
        counts: How often each was measured; by default once.

    Returns:
        By the names in FIGURES; all None where there are no latencies.
    """
    values = np.asarray(latencies_s, dtype=np.float64)
    weights = np.ones(len(values), np.int64) if counts is None else np.asarray(counts, np.int64)
    total = int(weights.sum())
    if total == 0:
        return dict.fromkeys(FIGURES)
    order = np.argsort(values)
    values, weights = values[order], weights[order]
    reached = np.cumsum(weights)
    found = {"mean": float(np.average(values, weights=weights))}
    for name, point in {"min": 0.0, **POINTS, "max": 100.0}.items():
        # Without the rounding, 99.9 % of 1000 would be the 1000th: 99.9 * 10 is 999.0000000000001.
        rank = max(1, math.ceil(round(point * total / 100, 9)))
        found[name] = float(values[np.searchsorted(reached, rank)])
    return found


def encode(latencies_s: ArrayLike, counts: ArrayLike | None = None) -> str:
    """An HdrHistogram from 1 us to 120 s with 3 digits, as HdrHistogram's tools read it.

    Args:
        latencies_s: In any order; what is outside counts as the least or the greatest.
        counts: How often each was measured; by default once.

    Returns:
        Compressed, format V2, base64.
    """
    latencies_us = np.rint(np.asarray(latencies_s, dtype=np.float64) * 1e6).astype(np.int64)
    values, inverse = np.unique(np.clip(latencies_us, _LOWEST_US, _HIGHEST_US), return_inverse=True)
    weights = np.bincount(
        inverse,
        weights=np.ones(len(inverse)) if counts is None else np.asarray(counts, np.float64),
        minlength=len(values),
    )
    histogram = _empty()
    for value, count in zip(values.tolist(), weights.tolist(), strict=True):
        histogram.record_value(value, int(count))
    return _text(histogram)


def decode(text: str) -> HdrHistogram:
    """What `encode` gave; its values are microseconds."""
    return HdrHistogram.decode(text)


def merge(texts: Iterable[str]) -> str:
    """One histogram of several, of rounds for instance."""
    merged = _empty()
    for text in texts:
        merged.decode_and_add(text)
    return _text(merged)


def percentile_of(histogram: HdrHistogram, point: float) -> float:
    """The latency in seconds that `point` percent did not exceed, to 3 digits."""
    return float(histogram.get_value_at_percentile(point)) / 1e6


def _empty() -> HdrHistogram:
    return HdrHistogram(_LOWEST_US, _HIGHEST_US, _DIGITS)


def _text(histogram: HdrHistogram) -> str:
    return bytes(histogram.encode()).decode()
