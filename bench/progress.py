"""How far a run is, and a line for each thing that it measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from bench.scenario import JobLoad, Load, RequestLoad, Scenario

__all__ = ["Progress", "describe_sample", "expected_s"]

_AROUND_S = 3.0
"""Waking a server, reading its counts."""
_START_S = 15.0
_JOB_S = 20.0
_JOB_ROWS_PER_S = 100_000.0
_TRIALS = 5
_BETWEEN_TRIALS_S = 1.0
_NOISE_CORES = 0.2


def expected_s(load: Load) -> float:
    """About how long a load takes of one server."""
    if isinstance(load, JobLoad):
        return _JOB_S + load.rows / _JOB_ROWS_PER_S
    if not isinstance(load, RequestLoad):
        return _START_S
    once_s = load.warm_up_s + load.seconds
    return (once_s + _BETWEEN_TRIALS_S) * _TRIALS if load.search else once_s + _AROUND_S


class Progress:
    """Prints lines with the time since the start, and about how long it will go on.

    Args:
        scenario: What is run.
        write: Prints a line.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        scenario: Scenario,
        write: Callable[[str], None] = lambda line: print(line, flush=True),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._write = write
        self._clock = clock
        self._began_s = clock()
        self._measuring_since_s: float | None = None
        self._done_s = 0.0
        self._all_s = scenario.rounds * sum(
            expected_s(load) * len(load.servers or scenario.servers)
            for load in scenario.loads.values()
        )

    def begin_measuring(self) -> None:
        """From here on it can be told how fast things go."""
        self._measuring_since_s = self._clock()

    def done(self, load: Load) -> None:
        """One server is through with a load."""
        self._done_s += expected_s(load)

    def left_s(self) -> float:
        """About how long it will go on: as planned, as long as nothing is done."""
        left_s = max(0.0, self._all_s - self._done_s)
        if self._measuring_since_s is None or not self._done_s:
            return left_s
        return left_s * (self._clock() - self._measuring_since_s) / self._done_s

    def say(self, text: str) -> None:
        """Prints a line."""
        elapsed = _clock_text(self._clock() - self._began_s)
        self._write(f"[{elapsed}, about {_clock_text(self.left_s())} left] {text}")


def describe_sample(sample: Mapping[str, Any]) -> str:
    """What was measured, in a line."""
    if "ready_s" in sample:
        return f"ready in {sample['ready_s']:.2f} s"
    if "rows" in sample:
        return f"{sample['seconds']:.1f} s, {sample['rate']:,.0f} rows/s{_noise(sample)}"
    latency_s = sample["latency_s"]
    parts = [f"{sample['rate']:,.0f}/s"]
    if sample.get("offered_rate"):
        parts[0] += f" of {sample['offered_rate']:,.0f}/s"
    parts += [
        f"{name} {latency_s[name] * 1e3:.2f} ms"
        for name in ("p50", "p99")
        if latency_s.get(name) is not None
    ]
    if refused := sample["refused"]["count"]:
        parts.append(f"{refused:,} refused")
    errors = {kind: count for kind, count in sample["errors"].items() if count}
    if errors:
        parts.append(f"ERRORS {errors}")
    if limited := (sample.get("generator") or {}).get("limited"):
        parts.append(f"LIMITED: {limited}")
    parts += [f"FAILED {event['what']}: {event['error']}" for event in _failed(sample)]
    return ", ".join(parts) + _noise(sample)


def _failed(sample: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [event for event in sample.get("events") or () if event["error"]]


def _noise(sample: Mapping[str, Any]) -> str:
    busy = sample.get("other_cores") or 0.0
    return f", {busy:.1f} cores busy with something else" if busy > _NOISE_CORES else ""


def _clock_text(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
