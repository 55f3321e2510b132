"""Counts of one replica since it started, as Triton's statistics extension shows them."""

from __future__ import annotations

import time
from collections import Counter

from rayprism.protocol.metadata import BatchStatistics, DurationStatistics, ModelStatistics

__all__ = ["BatchTimes", "Statistics"]

BatchTimes = tuple[float, float, float]
"""Seconds that one batch took: making it, running it, taking it apart."""


class Statistics:
    """Counts requests, rows, batches, and where their time went.

    Units: everything that comes in is in seconds; snapshots are in nanoseconds, as the protocol
    wants them.
    """

    def __init__(self) -> None:
        self.failures: Counter[str] = Counter()
        """Requests that got an error, by its code; `cancelled` where the client had left."""
        self._rows = 0
        self._served = _Sum()
        self._failed = _Sum()
        self._queue = _Sum()
        self._batches = 0
        self._by_rows: dict[int, _BatchSums] = {}
        self._last_s = 0.0

    def served(self, rows: int, queue_s: float, total_s: float) -> None:
        """One request was answered: how long it waited, and how long it took in all."""
        self._rows += rows
        self._queue.add(queue_s)
        self._served.add(total_s)

    def failed(self, code: str, total_s: float) -> None:
        """One request got an error, or its client left."""
        self.failures[code] += 1
        self._failed.add(total_s)

    def batch(self, rows: int, times: BatchTimes) -> None:
        """One batch ran."""
        self._batches += 1
        sums = self._by_rows.get(rows)
        if sums is None:
            sums = self._by_rows[rows] = _BatchSums()
        sums.add(times)
        self._last_s = time.time()

    def snapshot(self) -> ModelStatistics:
        """The counts of this moment."""
        total = _BatchSums()
        for sums in self._by_rows.values():
            total.merge(sums)
        whole = total.snapshot()
        return ModelStatistics(
            inference_count=self._rows,
            execution_count=self._batches,
            last_inference_ms=int(self._last_s * 1000),
            success=self._served.snapshot(),
            fail=self._failed.snapshot(),
            queue=self._queue.snapshot(),
            compute_input=whole.compute_input,
            compute_infer=whole.compute_infer,
            compute_output=whole.compute_output,
            batch_stats={rows: sums.snapshot() for rows, sums in self._by_rows.items()},
        )


class _Sum:
    __slots__ = ("count", "seconds")

    def __init__(self) -> None:
        self.count = 0
        self.seconds = 0.0

    def add(self, seconds: float) -> None:
        self.count += 1
        self.seconds += seconds

    def snapshot(self) -> DurationStatistics:
        return DurationStatistics(self.count, round(self.seconds * 1e9))


class _BatchSums:
    __slots__ = ("count", "infer_s", "input_s", "output_s")

    def __init__(self) -> None:
        self.count = 0
        self.input_s = 0.0
        self.infer_s = 0.0
        self.output_s = 0.0

    def add(self, times: BatchTimes) -> None:
        self.count += 1
        self.input_s += times[0]
        self.infer_s += times[1]
        self.output_s += times[2]

    def merge(self, other: _BatchSums) -> None:
        self.count += other.count
        self.input_s += other.input_s
        self.infer_s += other.infer_s
        self.output_s += other.output_s

    def snapshot(self) -> BatchStatistics:
        return BatchStatistics(
            DurationStatistics(self.count, round(self.input_s * 1e9)),
            DurationStatistics(self.count, round(self.infer_s * 1e9)),
            DurationStatistics(self.count, round(self.output_s * 1e9)),
        )
