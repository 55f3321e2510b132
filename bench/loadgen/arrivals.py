"""When the requests of an open loop are meant to leave."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench.scenario import Arrivals

__all__ = ["TraceInvalid", "read_trace", "schedule", "times"]

_MEASURED, _WARM_UP = 0, 1
"""Streams of one seed."""


class TraceInvalid(Exception):
    """The file is no trace: it says where."""


def schedule(
    arrivals: Arrivals, rate: float, seconds: float, warm_up_s: float, seed: int
) -> NDArray[np.float64]:
    """All of a load's intended times; those of the warm-up are negative.

    What is measured does not depend on how long the warm-up is: each has a stream of its own.

    Args:
        arrivals: Which process.
        rate: Requests/s, in the mean.
        seconds: To be measured, from 0.
        warm_up_s: Before it.
        seed: Equal seeds give equal times.

    Returns:
        In order, within -warm_up_s and seconds.

    Raises:
        TraceInvalid: The trace cannot be read, or is none.
    """
    warm_up = times(arrivals, rate, warm_up_s, np.random.default_rng([seed, _WARM_UP]))
    measured = times(arrivals, rate, seconds, np.random.default_rng([seed, _MEASURED]))
    return np.concatenate([warm_up - warm_up_s, measured])


def times(
    arrivals: Arrivals, rate: float, seconds: float, rng: np.random.Generator
) -> NDArray[np.float64]:
    """The intended times of a stretch.

    Args:
        arrivals: Which process. `constant`: equal gaps. `poisson`: independent of each other.
            `bursts`: a Poisson process that begins with a burst; its mean is the rate over whole
            `every_s`. `trace`: stretched as a whole until its mean is the rate, then repeated, or
            cut off, to fill the stretch.
        rate: Requests/s, in the mean.
        seconds: How long the stretch is.
        rng: What random processes draw from.

    Returns:
        In order, at least 0 and less than `seconds`.

    Raises:
        TraceInvalid: The trace cannot be read, or is none.
    """
    if arrivals.kind == "constant":
        return _within(np.arange(math.ceil(rate * seconds) + 1) / rate, seconds)
    if arrivals.kind == "poisson":
        return _poisson(np.array([0.0, seconds]), np.array([0.0, rate * seconds]), rng)
    if arrivals.kind == "bursts":
        return _poisson(*_burst_counts(arrivals, rate, seconds), rng)
    if arrivals.file is None:
        raise TraceInvalid("arrivals of kind trace need a file")
    trace = read_trace(arrivals.file)
    # A gap of mean length lies between the last request and the first of the repetition.
    period_s = trace[-1] + (trace[-1] - trace[0]) / (len(trace) - 1)
    stretched_s = len(trace) / rate
    repetitions = np.arange(math.ceil(seconds / stretched_s))
    starts = repetitions[:, np.newaxis] * stretched_s
    return _within((starts + trace * (stretched_s / period_s)).ravel(), seconds)


def read_trace(path: Path) -> NDArray[np.float64]:
    """The times in a file, in order: seconds from the start, one a line; `#` begins a comment.

    Raises:
        TraceInvalid: It cannot be read; a line is no time; or all are the same time.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TraceInvalid(f"{path}: {error}") from None
    found = []
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 <= value < math.inf:
            raise TraceInvalid(
                f"{path}, line {number}: {text!r}, allowed are seconds from the start, 0 or more"
            )
        found.append(value)
    trace = np.sort(np.array(found))
    if len(trace) < 2 or trace[0] == trace[-1]:
        raise TraceInvalid(f"{path}: a trace needs two different times at least")
    if trace[0] > trace[-1] - trace[0]:
        raise TraceInvalid(
            f"{path}: the first request comes {trace[0]:g} s after the start, and the last one "
            f"{trace[-1] - trace[0]:g} s after it: give seconds from the start of the trace"
        )
    return trace


def _within(drawn: NDArray[np.float64], seconds: float) -> NDArray[np.float64]:
    return drawn[drawn < seconds]


def _poisson(
    moments: NDArray[np.float64], expected: NDArray[np.float64], rng: np.random.Generator
) -> NDArray[np.float64]:
    """A Poisson process.

    Args:
        moments: From 0 to the end; the rate changes at those between.
        expected: How many requests are expected until each.
        rng: What it draws from.

    Source: given their number, the times of a Poisson process are independent, and distributed as
    the rate is. Kingman, Poisson Processes, section 2.4.
    """
    drawn = np.sort(rng.random(rng.poisson(expected[-1]))) * expected[-1]
    # Where the next number is the end itself: `random` stays below 1, a product with it may not.
    return _within(np.interp(drawn, expected, moments), moments[-1])


def _burst_counts(
    arrivals: Arrivals, rate: float, seconds: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    burst_s, every_s = arrivals.burst_s, arrivals.every_s
    in_burst = rate * arrivals.burst_factor * burst_s
    whole = rate * every_s
    starts = np.arange(math.ceil(seconds / every_s) + 1)[:, np.newaxis]
    moments = (starts * every_s + [0.0, burst_s]).ravel()
    expected = (starts * whole + [0.0, in_burst]).ravel()
    inside = moments < seconds
    end = np.interp(seconds, moments, expected)
    return np.append(moments[inside], seconds), np.append(expected[inside], end)
