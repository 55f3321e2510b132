"""How sure a median of a few rounds is: intervals by resampling the rounds.

A handful of rounds cannot give much: the 95 % interval of the median of five reaches about from the
least of them to the most. That is what is wanted here, where the question is whether two medians
differ by more than rounds of the same thing do among themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["interval", "ratio_interval"]

_RESAMPLES = 4_000

Numbers = npt.NDArray[np.float64]
Statistic = Callable[..., Any]
"""`numpy.median`, `numpy.mean`: takes an array and `axis`."""


def interval(
    values: Sequence[float],
    seed: int,
    statistic: Statistic = np.median,
    level: float = 0.95,
) -> tuple[float, float]:
    """The percentile bootstrap interval of a statistic of values, one for each round.

    Args:
        values: At least one. One alone is its own interval, of no width: that says nothing about
            the noise, so whoever asks has to look at how many rounds there are.
        seed: The same seed and values give the same interval.
        statistic: Of the values along an axis.
        level: The share of resamples whose statistic is inside.

    Raises:
        ValueError: There are no values, one is not finite, or the level is no share.

    Source:
        Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    known = _checked(values, "values")
    return _ends(_resampled(known, np.random.default_rng(seed), statistic), level)


def ratio_interval(
    above: Sequence[float],
    below: Sequence[float],
    seed: int,
    paired: bool,
    statistic: Statistic = np.median,
    level: float = 0.95,
) -> tuple[float, float]:
    """The bootstrap interval of a ratio.

    Args:
        above: What is divided, one for each round.
        below: What it is divided by; greater than 0.
        seed: The same seed and values give the same interval.
        paired: Whether values at the same place were measured side by side. Then it is the interval
            of the median of their ratios, which keeps out what slowed both. Otherwise it is that
            of the ratio of medians, each side resampled for itself.
        statistic: As for `interval`.
        level: As for `interval`.

    Raises:
        ValueError: As for `interval`; a divisor is not greater than 0; pairs are not complete.
    """
    upper, lower = _checked(above, "above"), _checked(below, "below")
    if lower.min() <= 0:
        raise ValueError(f"below has {lower.min():g}: only what is greater than 0 divides")
    rng = np.random.default_rng(seed)
    if not paired:
        return _ends(
            _resampled(upper, rng, statistic) / _resampled(lower, rng, statistic),
            level,
        )
    if len(upper) != len(lower):
        raise ValueError(f"{len(upper)} values above and {len(lower)} below make no pairs")
    return _ends(_resampled(upper / lower, rng, statistic), level)


def _checked(values: Sequence[float], name: str) -> Numbers:
    known = np.asarray(values, dtype=np.float64)
    if known.ndim != 1 or not known.size:
        raise ValueError(f"{name} has no values: an interval needs one at least")
    if not np.isfinite(known).all():
        raise ValueError(f"{name} has a value that is not finite: leave such rounds out")
    return known


def _resampled(values: Numbers, rng: np.random.Generator, statistic: Statistic) -> Numbers:
    """The statistic of each resample. Shapes: [resamples] float64."""
    picked = rng.integers(0, len(values), size=(_RESAMPLES, len(values)))
    found: Numbers = statistic(values[picked], axis=1)
    return found


def _ends(found: Numbers, level: float) -> tuple[float, float]:
    if not 0 < level < 1:
        raise ValueError(f"level is {level}: a share between 0 and 1 is wanted, such as 0.95")
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
    return float(low), float(high)
