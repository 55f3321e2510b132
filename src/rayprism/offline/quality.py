"""Whether versions of a model differ in quality on the same labelled rows. Pure.

What is measured of each task is in `rayprism.offline.quality_tasks`; here is what is concluded.
Every interval is of one number seen alone, and takes the rows as independent of each other.

Source: Efron and Tibshirani, "An Introduction to the Bootstrap" (1993): paired percentile
intervals (chapter 13). Politis, Romano and Wolf, "Subsampling" (1999), chapter 2: of `b` out of
`n` rows, deviations shrink by `sqrt(b / n)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from rayprism.core.tensors import Array
from rayprism.offline.rows import Rows

__all__ = [
    "FEW_ROWS",
    "MOST_RESAMPLED_ROWS",
    "Comparison",
    "Difference",
    "Estimate",
    "Interval",
    "Metric",
    "Scored",
    "Segment",
    "Statistic",
    "Verdict",
    "compare",
    "compare_segments",
    "judge",
    "mean_interval",
]

MOST_RESAMPLED_ROWS = 200_000
"""Of more rows than this the bootstrap takes a part, drawn by lot."""
FEW_ROWS = 30
"""Of fewer rows no verdict is given: neither kind of interval holds what it promises."""

_MOST_UNDEFINED = 0.01
"""Share of resamples that may have no value, as an AUC without a positive row has none."""

Interval = tuple[float, float]
Method = Literal["bootstrap", "bootstrap of a sample", "t"]
Verdict = Literal["better", "worse", "no difference shown", "not known"]
Statistic = Callable[[Array], Mapping[str, Array]]
"""Weights of the sampled rows, `[sample] float64`, to each metric of each version, `[versions]`."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One number that says how good predictions are.

    Args:
        name: In `report.json`; stable.
        title: For people.
        better: Where better values lie; `zero`: nearer to 0.
        is_mean: Whether it is the mean of a loss that each row has.
        is_biased: Whether resampling moves it to one side, so that its intervals are centred.
    """

    name: str
    title: str
    better: Literal["higher", "lower", "zero"]
    is_mean: bool = False
    is_biased: bool = False


class Scored(Protocol):
    """Labels of rows, and what each version predicted for them."""

    @property
    def rows(self) -> int:
        """How many."""

    @property
    def versions(self) -> int:
        """How many; the first one is the baseline."""

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Those that can be told of these predictions."""

    def value(self, metric: str, version: int) -> float:
        """A metric over all rows; NaN where it is not defined."""

    def losses(self, metric: str, version: int) -> Array:
        """What each row adds to a metric that is a mean. Shapes: returns `[rows] float64`."""

    def statistic(self, sample: Rows | None) -> Statistic:
        """All metrics of all versions as a function of row weights.

        Args:
            sample: Indices of the rows that are weighted; None for all.
        """


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and its interval; None where there is none."""

    value: float | None
    interval: Interval | None


@dataclass(frozen=True, slots=True)
class Difference:
    """A version less the baseline; of metrics that are best at 0, of their absolute values."""

    value: float | None
    interval: Interval | None
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Comparison:
    """One metric of all versions.

    Args:
        metric: Which.
        method: Of its intervals.
        versions: Of each version, the baseline first.
        differences: Of each version but the baseline.
    """

    metric: Metric
    method: Method
    versions: tuple[Estimate, ...]
    differences: tuple[Difference, ...]


@dataclass(frozen=True, slots=True)
class Segment:
    """The rows with one value of a column.

    Args:
        code: Of the value.
        rows: How many.
        comparisons: Of the metrics that are means.
    """

    code: int
    rows: int
    comparisons: tuple[Comparison, ...]


def compare(
    scored: Scored,
    *,
    confidence: float,
    resamples: int,
    random: np.random.Generator,
    most_rows: int = MOST_RESAMPLED_ROWS,
) -> tuple[Comparison, ...]:
    """Compares versions by every metric, paired: each resample has the same rows of all versions.

    Args:
        scored: At least one row.
        confidence: Of the intervals, as 0.95.
        resamples: Of the bootstrap.
        random: Where its rows come from.
        most_rows: Of more rows, means take Student's t on all of them, and other metrics the
            bootstrap of so many rows.
    """
    rows, versions = scored.rows, scored.versions
    sampled = rows > most_rows
    sample = np.sort(random.choice(rows, most_rows, replace=False)) if sampled else None
    size = most_rows if sampled else rows
    statistic = scored.statistic(sample)
    centre = statistic(np.ones(size))
    drawn = {metric.name: np.empty((resamples, versions)) for metric in scored.metrics}
    for index in range(resamples):
        weights = np.bincount(random.integers(size, size=size), minlength=size)
        for name, values in statistic(weights.astype(np.float64)).items():
            drawn[name][index] = values
    scale = math.sqrt(size / rows)
    found = []
    for metric in scored.metrics:
        values = np.array([scored.value(metric.name, version) for version in range(versions)])
        if metric.is_mean and sampled:
            found.append(_compare_means(scored, metric, values, confidence))
        else:
            method: Method = "bootstrap of a sample" if sampled else "bootstrap"
            spread = _Spread(metric, drawn[metric.name], centre[metric.name], scale, confidence)
            found.append(_conclude(metric, method, values, spread, rows))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class _Spread:
    """Intervals out of resamples. Shapes: `drawn [resamples, versions]`, `centre [versions]`."""

    metric: Metric
    drawn: Array
    centre: Array
    scale: float
    confidence: float

    def of_value(self, value: float, version: int) -> Interval | None:
        return self._interval(value, self.drawn[:, version], float(self.centre[version]))

    def of_difference(self, difference: float, version: int) -> Interval | None:
        drawn, centre = _signed(self.metric, self.drawn), _signed(self.metric, self.centre)
        return self._interval(
            difference, drawn[:, version] - drawn[:, 0], float(centre[version] - centre[0])
        )

    def _interval(self, value: float, drawn: Array, centre: float) -> Interval | None:
        known = drawn[np.isfinite(drawn)]
        if len(known) < (1 - _MOST_UNDEFINED) * len(drawn) or not math.isfinite(value):
            return None
        if self.metric.is_biased:
            centre = float(known.mean())
        tail = (1 - self.confidence) / 2
        low, high = np.quantile(known, [tail, 1 - tail])
        if self.scale == 1 and not self.metric.is_biased:
            return float(low), float(high)
        return value + float(low - centre) * self.scale, value + float(high - centre) * self.scale


def _signed(metric: Metric, values: Array) -> Array:
    return np.abs(values) if metric.better == "zero" else values


def _conclude(
    metric: Metric, method: Method, values: Array, spread: _Spread, rows: int
) -> Comparison:
    estimates = [
        Estimate(_known(value), spread.of_value(float(value), version))
        for version, value in enumerate(values)
    ]
    compared = _signed(metric, values)
    differences = []
    for version in range(1, len(values)):
        difference = float(compared[version] - compared[0])
        interval = spread.of_difference(difference, version)
        verdict = judge(metric, interval, rows)
        differences.append(Difference(_known(difference), interval, verdict))
    return Comparison(metric, method, tuple(estimates), tuple(differences))


def _compare_means(scored: Scored, metric: Metric, values: Array, confidence: float) -> Comparison:
    base = scored.losses(metric.name, 0)
    estimates, differences = [], []
    for version, value in enumerate(values):
        losses = scored.losses(metric.name, version)
        interval = _interval_of(losses, confidence)
        estimates.append(Estimate(_known(value), interval))
        if version:
            losses = losses - base
            interval = _interval_of(losses, confidence)
            verdict = judge(metric, interval, scored.rows)
            differences.append(Difference(_known(losses.mean()), interval, verdict))
    return Comparison(metric, "t", tuple(estimates), tuple(differences))


def _interval_of(losses: Array, confidence: float) -> Interval | None:
    return mean_interval(len(losses), losses.mean(), losses.std(ddof=1), confidence)


def mean_interval(rows: int, mean: float, deviation: float, confidence: float) -> Interval | None:
    """The interval of a mean by Student's t, which for many rows is the normal distribution.

    Args:
        rows: How many.
        mean: Of them.
        deviation: Standard deviation, with `rows - 1` below the line.
        confidence: As 0.95.

    Returns:
        None for fewer than 2 rows.
    """
    from scipy import stats

    if rows < 2 or not math.isfinite(deviation):
        return None
    if deviation == 0:
        return float(mean), float(mean)
    scale = deviation / math.sqrt(rows)
    low, high = stats.t.interval(confidence, rows - 1, loc=mean, scale=scale)
    return float(low), float(high)


def judge(metric: Metric, interval: Interval | None, rows: int) -> Verdict:
    """What an interval of a difference says of a version beside the baseline."""
    if interval is None or rows < FEW_ROWS:
        return "not known"
    low, high = interval
    if low <= 0 <= high:
        return "no difference shown"
    return "better" if (low > 0) == (metric.better == "higher") else "worse"


def compare_segments(
    scored: Scored, codes: Array, *, confidence: float, most: int = 20
) -> tuple[Segment, ...]:
    """Compares versions within the rows of each value of a column, by metrics that are means.

    Args:
        scored: The rows.
        codes: The value of each row as a number from 0. Shape: `[rows]`.
        confidence: Of the intervals.
        most: Of the values, those with the most rows.
    """
    counts = np.bincount(codes)
    order = np.argsort(-counts, kind="stable")[:most]
    order = order[counts[order] > 0]
    found: dict[int, list[Comparison]] = {int(code): [] for code in order}
    for metric in scored.metrics:
        if not metric.is_mean:
            continue
        base = scored.losses(metric.name, 0)
        values, differences = [_moments(codes, counts, base)], []
        for version in range(1, scored.versions):
            losses = scored.losses(metric.name, version)
            values.append(_moments(codes, counts, losses))
            differences.append(_moments(codes, counts, losses - base))
        for code, comparisons in found.items():
            rows = int(counts[code])
            estimates = tuple(
                Estimate(mean[code], mean_interval(rows, mean[code], deviation[code], confidence))
                for mean, deviation in values
            )
            paired = []
            for mean, deviation in differences:
                interval = mean_interval(rows, mean[code], deviation[code], confidence)
                verdict = judge(metric, interval, rows)
                paired.append(Difference(float(mean[code]), interval, verdict))
            comparisons.append(Comparison(metric, "t", estimates, tuple(paired)))
    return tuple(
        Segment(code, int(counts[code]), tuple(comparisons)) for code, comparisons in found.items()
    )


def _moments(codes: Array, counts: Array, values: Array) -> tuple[Array, Array]:
    """Mean and standard deviation within each code. NaN where there are no rows, or only one."""
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.bincount(codes, values) / counts
        # In two passes: a mean that is large beside its deviation would eat the digits.
        squares = np.bincount(codes, (values - mean[codes]) ** 2)
        return mean, np.sqrt(squares / (counts - 1))


def _known(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
