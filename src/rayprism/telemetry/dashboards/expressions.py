"""Pieces of PromQL that several dashboards need.

Every series of ours is written with `ours`, so that none is asked for that is not recorded.
"""

from __future__ import annotations

from rayprism.telemetry.catalogue import EXPORT_PREFIX, find_metric

__all__ = [
    "events",
    "mean",
    "ours",
    "quantile",
    "rate",
    "ratio",
    "select",
    "sum_by",
]

RATE_WINDOW = "$__rate_interval"
BAR_WINDOW = "$__interval"
"""From one bar to the next: the bars' sum is how often it happened."""


def select(name: str, scope: tuple[str, ...], *matchers: str) -> str:
    """Series of any name.

    Args:
        name: As in Prometheus.
        scope: Matchers that all queries of a dashboard share.
        matchers: More of them.
    """
    return f"{name}{{{','.join((*matchers, *scope))}}}"


def ours(name: str, scope: tuple[str, ...], *matchers: str, part: str = "") -> str:
    """Series of a metric in the catalogue.

    Args:
        name: As in the catalogue.
        scope: As in `select`.
        matchers: As in `select`.
        part: Of a histogram: `bucket`, `sum` or `count`.

    Raises:
        KeyError: It is not in the catalogue.
        ValueError: A part of what is no histogram, or none of one.
    """
    if (find_metric(name).kind == "histogram") != bool(part):
        raise ValueError(f"{name} and part {part!r} do not fit")
    return select(f"{EXPORT_PREFIX}{name}" + (f"_{part}" if part else ""), scope, *matchers)


def sum_by(labels: str, expr: str) -> str:
    """One series for each value of the labels; a single one where there are none."""
    return f"sum by ({labels}) ({expr})" if labels else f"sum({expr})"


def rate(series: str) -> str:
    """By second."""
    return f"rate({series}[{RATE_WINDOW}])"


def events(labels: str, series: str, window: str = BAR_WINDOW) -> str:
    """How often something rare happened within a window.

    A series that began within it counts from 0: its first value is the news, and `increase` would
    not show it.
    """
    new = f"{series} unless {series} offset {window}"
    return sum_by(labels, f"({new}) or increase({series}[{window}])")


def ratio(part: str, whole: str) -> str:
    """A part of a whole: 0 where there is no part, nothing where there is no whole.

    Args:
        part: Has the labels of `whole`.
        whole: The same.
    """
    return f"({part} or {whole} * 0) / ({whole} > 0)"


def quantile(q: float, labels: str, buckets: str, window: str = RATE_WINDOW) -> str:
    """A percentile of a histogram that has no recording rule."""
    return f"histogram_quantile({q}, sum by ({labels}, le) (rate({buckets}[{window}])))"


def mean(labels: str, total: str, count: str) -> str:
    """What one of them was, on average."""
    return f"{sum_by(labels, rate(total))} / ({sum_by(labels, rate(count))} > 0)"
