"""What recording and alert rules share: durations that can be shrunk, pieces of PromQL."""

from __future__ import annotations

__all__ = ["MIN_WINDOW_S", "Durations", "format_duration", "rose", "sum_by"]

MIN_WINDOW_S = 15.0
"""Shortest window of scaled rules. Replicas send every 5 s, and a rate needs two values of which
one is new: with a scrape every 5 s or less, 15 s always holds them."""

_UNITS = (("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1))


class Durations:
    """Windows and waits of rules, each multiplied by the same factor.

    Args:
        scale: 1 for rules as they are meant. Less makes every alert fire and end sooner, for tests
            with real traffic: windows shrink to no less than `MIN_WINDOW_S`, waits to a second.

    Raises:
        ValueError: The scale is not in (0, 1].
    """

    def __init__(self, scale: float = 1.0) -> None:
        if not 0.0 < scale <= 1.0:
            raise ValueError(f"the scale is {scale:g}; it has to be over 0 and at most 1")
        self._scale = scale

    def window(self, seconds: float) -> str:
        """The range of a rate, as in `[5m]` but without the brackets."""
        return self._scaled(seconds, MIN_WINDOW_S)

    def wait(self, seconds: float) -> str:
        """How long something has to last: the `for:` of an alert."""
        return self._scaled(seconds, 1.0)

    def _scaled(self, seconds: float, least_s: float) -> str:
        if self._scale == 1.0:
            return format_duration(seconds)
        return format_duration(max(least_s, round(seconds * self._scale)))


def format_duration(seconds: float) -> str:
    """As Prometheus writes it: `1h30m`, `10s`, `500ms`.

    Raises:
        ValueError: Not above 0.
    """
    left_ms = round(seconds * 1000)
    if left_ms <= 0:
        raise ValueError(f"a duration of {seconds:g} s is not above 0")
    parts = []
    for unit, size_ms in _UNITS:
        count, left_ms = divmod(left_ms, size_ms)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts)


def sum_by(labels: str, expression: str) -> str:
    """`sum by (cluster, model) (...)`."""
    return f"sum by ({labels}) ({expression})"


def rose(series: str, labels: str, window: str) -> str:
    """How much a counter that seldom moves rose in a window; only where it did.

    A counter may appear with its first value instead of 0, which `increase` does not count: what
    was not there one window ago counts whole.

    Args:
        series: A selector of a counter.
        labels: What to sum it by.
        window: How far to look back.
    """
    return (
        f"{sum_by(labels, f'increase({series}[{window}])')} > 0\n"
        "or\n"
        f"{sum_by(labels, f'{series} unless {series} offset {window}')} > 0"
    )
