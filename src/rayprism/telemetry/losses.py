"""Counts what could not be kept, and does not fill the log with it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

__all__ = ["Losses"]

# Where a replica's log is; elsewhere a logger like any other.
_log = logging.getLogger("ray.serve.rayprism")

_SAY_AGAIN_S = 60.0


class Losses:
    """What one part of telemetry lost. Any thread may add to it.

    Args:
        what: Is lost, in the plural: `lines of the request log`.
        clock: Seconds.
    """

    def __init__(self, what: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.total = 0
        self._what = what
        self._clock = clock
        self._lock = threading.Lock()
        self._unsaid = 0
        self._said_s: float | None = None

    def add(self, number: int, why: str) -> None:
        """Counts a loss; logs it, with all since the last time, at most once a minute."""
        now_s = self._clock()
        with self._lock:
            self.total += number
            self._unsaid += number
            if self._said_s is not None and now_s - self._said_s < _SAY_AGAIN_S:
                return
            self._said_s = now_s
            unsaid, self._unsaid = self._unsaid, 0
        _log.warning("%d %s are lost, %d so far: %s", unsaid, self._what, self.total, why)
