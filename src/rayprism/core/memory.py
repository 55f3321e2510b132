"""How large batches may be where memory has run out: halved at once, raised again slowly."""

from __future__ import annotations

from dataclasses import replace

from rayprism.core.batching import BatchLimits

__all__ = ["MemoryLimit"]

_FIRST_WAIT_S = 60.0
_LONGEST_WAIT_S = 3600.0
_RAISE = 8


class MemoryLimit:
    """The cost that a batch may have, by what has run out of memory.

    A batch that does not fit halves the limit. Whoever else uses the device may give memory back,
    so after a minute without a failure the limit rises by an eighth. A rise that was too much is
    taken back, and the next one waits twice as long, an hour at most.

    Units: cost is rows times padded length; rows, where the model has no ragged axis.

    Args:
        ragged: Whether the model has a ragged axis.
    """

    def __init__(self, ragged: bool) -> None:
        self.cost: int | None = None
        """The limit; None where the configured bounds fit."""
        self._ragged = ragged
        self._worst = 0
        self._before: int | None = None
        self._wait_s = _FIRST_WAIT_S
        self._since_s = 0.0

    def ran_out(self, cost: int, now_s: float) -> bool:
        """A batch of several rows has run out of memory.

        One row that does not fit says nothing of batches: it is not to be told here.

        Args:
            cost: Of the batch.
            now_s: The time.

        Returns:
            Whether the limit has changed.
        """
        limit, before = self.cost, self._before
        self._worst = max(self._worst, cost)
        if limit is not None and cost > limit:
            return False  # cut before the limit was, or a row too long for it
        self._since_s = now_s
        if before is not None and cost > before:
            self.cost, self._before = before, None
            self._wait_s = min(2 * self._wait_s, _LONGEST_WAIT_S)
            return True
        self.cost, self._before = max(1, cost // 2), None
        return self.cost != limit

    def ran(self, limits: BatchLimits, now_s: float) -> bool:
        """A batch has run.

        Args:
            limits: As configured.
            now_s: The time.

        Returns:
            Whether the limit has changed.
        """
        limit = self.cost
        if limit is None or now_s - self._since_s < self._wait_s:
            return False
        if self._before is not None:
            self._wait_s = max(self._wait_s / 2, _FIRST_WAIT_S)
        self._before, self._since_s = limit, now_s
        self.cost = limit + max(1, limit // _RAISE)
        if self.cost >= self._most(limits):
            self.cost = None
        return True

    def bound(self, limits: BatchLimits) -> BatchLimits:
        """The configured bounds, lowered to what fits."""
        if self.cost is None:
            return limits
        if self._ragged:
            return replace(limits, max_cost=min(self.cost, limits.max_cost or self.cost))
        return replace(limits, max_rows=min(self.cost, limits.max_rows))

    def share(self, limits: BatchLimits) -> float:
        """What is left of the configured bound, more than 0 to 1."""
        if self.cost is None:
            return 1.0
        return min(1.0, self.cost / self._most(limits))

    def _most(self, limits: BatchLimits) -> int:
        if not self._ragged:
            return limits.max_rows
        # Where nothing is configured, what has failed is the measure.
        return limits.max_cost or self._worst
