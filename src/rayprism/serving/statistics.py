"""Counts of one replica since it started, as Triton's statistics extension shows them."""

from __future__ import annotations

import time
from collections import Counter


__all__ = ["Statistics"]


class Statistics:
    """Counts requests, rows, batches, and where their time went.

    Units: everything that comes in is in seconds; snapshots are in nanoseconds, as the protocol
    wants them.
    """

    def __init__(self) -> None:
        self.failures: Counter[str] = Counter()
        """Failed requests by the code of their error."""
        self._rows = 0
        self._batches = 0
        self._served = 0
        self._cancelled = 0
        self._rejected = 0
        self._queue_s = 0.0
        self._compute_s = 0.0
        self._by_size: dict[int, list[float]] = {}
        self._last_s = 0.0

    def served(self, rows: int, queue_s: float, compute_s: float) -> None:
        """One request was answered."""
        self._served += 1
        self._rows += rows
        self._queue_s += queue_s
        self._compute_s += compute_s

    def batch(self, rows: int, run_s: float) -> None:
        """One batch ran."""
        self._batches += 1
        entry = self._by_size.get(rows)
        if entry is None:
            entry = self._by_size[rows] = [0, 0.0]
        entry[0] += 1
        entry[1] += run_s
        self._last_s = time.time()

    def failed(self, code: str) -> None:
        """One request got an error after it had been accepted."""
        self.failures[code] += 1

    def cancelled(self) -> None:
        """One request's client left before it was answered."""
        self._cancelled += 1

    def rejected(self) -> None:
        """One request met a full queue."""
        self._rejected += 1
