"""Where batches run: on the event loop, or in a thread beside it."""

from __future__ import annotations

from enum import StrEnum

__all__ = ["INLINE_LIMIT_S", "Place", "Placement"]

INLINE_LIMIT_S = 0.001
"""A model whose largest batch takes less than this runs on the event loop: handing it to a thread
would cost more than it takes. What takes longer would hold up other requests there."""

_SLOW_BATCH_S = 5 * INLINE_LIMIT_S
_LIMIT = 20.0
_MOST_FOR_ONE = 5.0
_FORGIVEN_BY_ONE = 0.1


class Place(StrEnum):
    """Where a batch runs."""

    INLINE = "inline"
    """On the event loop, together with what else arrives in the same turn of it."""
    THREAD = "thread"
    """In the model's thread."""


class Placement:
    """Where the batches of one model run, by what was measured while it was warmed up.

    A model that turns out to be slow leaves the event loop for good. One slow batch is more likely
    the machine's fault than the model's: each is counted as often as it is longer than 5 ms, but
    at most five times; at 20 the model leaves, and ten fast batches make up for one point.

    Args:
        execution: `inline` or `thread` to fix it, `auto` to go by the measurement.
        measured_run_s: How long the largest batch takes.
    """

    def __init__(self, execution: str, measured_run_s: float) -> None:
        self._may_leave = execution == "auto"
        self._slowness = 0.0
        inline = execution == "inline" or (self._may_leave and measured_run_s < INLINE_LIMIT_S)
        self.place = Place.INLINE if inline else Place.THREAD

    def observe(self, run_s: float) -> bool:
        """Takes one batch into account.

        Returns:
            Whether the model has to leave the event loop now.
        """
        if run_s <= _SLOW_BATCH_S:
            if self._slowness:
                self._slowness = max(0.0, self._slowness - _FORGIVEN_BY_ONE)
            return False
        if self.place is Place.THREAD or not self._may_leave:
            return False
        self._slowness += min(run_s / _SLOW_BATCH_S, _MOST_FOR_ONE)
        if self._slowness < _LIMIT:
            return False
        self.place = Place.THREAD
        return True
