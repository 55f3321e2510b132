"""What to run next: the waiting requests of one replica, and the batches made of them.

Late binding: nothing is put into a batch before the model is free, so a batch holds what waits at
that moment. The queue is told the time and answers with a `Decision`; it runs nothing itself.
Every request that was pushed leaves exactly once: in a batch that succeeded, as the one at fault
in a batch that failed, expired, or cancelled.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

__all__ = ["BatchLimits", "BatchQueue", "Decision", "Pending", "ServiceRate", "plan_pieces"]

_NO_BATCH: tuple[Pending, ...] = ()


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """The bounds that batches and the queue keep.

    Args:
        max_rows: Most rows in one batch.
        max_queue_rows: Most rows that wait.
        max_cost: Most `rows * padded length` in one batch; None: no bound.
        max_padding_share: Most of a batch's cost that may be padding; 1: no bound.
        max_delay_s: How long a batch that is not full may wait for more rows.
    """

    max_rows: int
    max_queue_rows: int
    max_cost: int | None = None
    max_padding_share: float = 1.0
    max_delay_s: float = 0.0


class Pending:
    """A request that waits, or one piece of a request that was too large for one batch.

    Args:
        item: The caller's own; the queue does not look at it.
        rows: At least 1 and at most `max_rows`.
        arrival_s: When it came, in seconds of the clock that `decide` is told.
        deadline_s: When its answer is worthless, on the same clock.
        priority: Smaller goes first.
        length: Of its ragged axis; 1 where the model has none.
        key: Only requests with equal keys share a batch.
    """

    __slots__ = (
        "_number",
        "arrival_s",
        "cancelled",
        "deadline_s",
        "item",
        "key",
        "length",
        "priority",
        "rows",
        "waiting",
    )

    def __init__(
        self,
        item: Any,
        rows: int,
        arrival_s: float,
        deadline_s: float,
        priority: int = 0,
        length: int = 1,
        key: Hashable = None,
    ) -> None:
        self.item = item
        self.rows = rows
        self.arrival_s = arrival_s
        self.deadline_s = deadline_s
        self.priority = priority
        self.length = length
        self.key = key
        self.cancelled = False
        self.waiting = False
        self._number = -1

    def __repr__(self) -> str:
        return f"Pending({self.item!r}, rows={self.rows}, length={self.length})"


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do now.

    Args:
        batch: To run now, in this order; empty: nothing.
        expired: To answer with an exceeded deadline. They were not run.
        wake_s: When to ask again if nothing happens before; None: no need.
    """

    batch: tuple[Pending, ...]
    expired: tuple[Pending, ...]
    wake_s: float | None


class ServiceRate:
    """How fast the model works, measured on the batches that it ran.

    Args:
        weight: Share of the newest batch in the running averages.
    """

    def __init__(self, weight: float = 0.1) -> None:
        self._weight = weight
        self._rows = 0.0
        self._seconds = 0.0
        self.floor_s = 0.0
        """About the least time that a batch takes: what any request has to wait for at least."""

    def observe(self, rows: int, seconds: float) -> None:
        """Takes one batch into account."""
        if self._rows == 0.0:
            self._rows, self._seconds, self.floor_s = float(rows), seconds, seconds
            return
        self._rows += self._weight * (rows - self._rows)
        self._seconds += self._weight * (seconds - self._seconds)
        if seconds < self.floor_s:
            self.floor_s = seconds
        else:
            # Forgets slowly, so that one lucky batch does not stay the measure for ever.
            self.floor_s += 0.02 * (min(seconds, 2 * self.floor_s) - self.floor_s)

    @property
    def rows_per_s(self) -> float | None:
        """Rows per second of computing; None before the first batch."""
        if self._rows == 0.0 or self._seconds <= 0.0:
            return None
        return self._rows / self._seconds

    def retry_after_s(self, queued_rows: int) -> float:
        """When a full queue has drained by half, in seconds: a good time to come back.

        Coming back when there is just one free place would meet the same refusal again, and
        coming back when it is empty would leave the model idle.
        """
        rate = self.rows_per_s
        if rate is None:
            return 1.0
        return min(max(queued_rows / 2 / rate, 0.001), 3600.0)


def plan_pieces(rows: int, length: int, limits: BatchLimits) -> list[tuple[int, int]]:
    """Cuts a request into row ranges that each fit a batch.

    A single row that is over `max_cost` by itself is a piece of its own: it runs alone.
    """
    most = limits.max_rows
    if limits.max_cost is not None:
        most = min(most, max(1, limits.max_cost // length))
    return [(start, min(start + most, rows)) for start in range(0, rows, most)]


class BatchQueue:
    """The requests that wait for one model.

    Args:
        limits: May be replaced at any time; what waits is kept.
    """

    def __init__(self, limits: BatchLimits) -> None:
        self.limits = limits
        self.rows = 0
        """Rows that wait."""
        self._levels: dict[int, dict[int, Pending]] = {}
        self._order: list[int] = []
        self._deadlines: list[tuple[float, int, Pending]] = []
        self._retries: deque[tuple[Pending, ...]] = deque()
        self._numbers = count()
        self._waiting = 0

    def __len__(self) -> int:
        """Requests and pieces that wait."""
        return self._waiting

    def oldest_s(self) -> float | None:
        """When the request came that has waited longest; None where none waits."""
        heads = [next(iter(level.values())).arrival_s for level in self._levels.values() if level]
        heads += [p.arrival_s for part in self._retries for p in part if p.waiting]
        return min(heads, default=None)

    def has_room(self, rows: int) -> bool:
        """Whether so many more rows may wait."""
        return self.rows + rows <= self.limits.max_queue_rows

    def push(self, pending: Pending) -> None:
        """Lets a request wait. The caller has asked `has_room` before."""
        level = self._levels.get(pending.priority)
        if level is None:
            level = self._levels[pending.priority] = {}
            self._order = sorted(self._levels)
        number = pending._number = next(self._numbers)
        level[number] = pending
        heapq.heappush(self._deadlines, (pending.deadline_s, number, pending))
        self._enter(pending)

    def cancel(self, pending: Pending) -> None:
        """Takes a request back that nobody waits for any more. Idempotent."""
        pending.cancelled = True
        if pending.waiting:
            self._leave(pending)
            # A piece of a failed batch waits outside of the levels.
            self._levels[pending.priority].pop(pending._number, None)

    def split_failed(self, batch: Sequence[Pending]) -> Pending | None:
        """Takes back a batch that failed as a whole.

        A batch of one is returned: it is the one at fault. A larger batch is halved, and the
        halves are run before anything else, so that the fault is found in about
        `2 * log2(requests)` runs and the neighbours get their answers.
        """
        if len(batch) == 1:
            return batch[0]
        middle = len(batch) // 2
        self.retry(batch[:middle], batch[middle:])
        return None

    def retry(self, *batches: Sequence[Pending]) -> None:
        """Takes back requests, to be run before anything else, in these batches and this order."""
        for batch in reversed(batches):
            for pending in batch:
                if not pending.cancelled:
                    self._enter(pending)
                    # Its first entry may be gone already.
                    entry = (pending.deadline_s, next(self._numbers), pending)
                    heapq.heappush(self._deadlines, entry)
            self._retries.appendleft(tuple(batch))

    def decide(self, now_s: float, *, free: bool, floor_s: float = 0.0) -> Decision:
        """What to do now.

        Args:
            now_s: The time.
            free: Whether the model can take a batch now.
            floor_s: The least time that a batch takes: who could not be served in time even if
                run at once is expired now.
        """
        expired = self._expire(now_s + floor_s) if self._deadlines else []
        batch = _NO_BATCH
        wake_s: float | None = None
        if free:
            batch = self._next_retry(now_s + floor_s, expired)
            if not batch and self._waiting:
                batch, wake_s = self._form(now_s, floor_s)
        if self._deadlines:
            expiry_s = self._deadlines[0][0] - floor_s
            wake_s = expiry_s if wake_s is None else min(wake_s, expiry_s)
        return Decision(batch, tuple(expired), wake_s)

    def drain(self) -> list[Pending]:
        """Takes out everything that waits, to be refused by the caller."""
        left = [p for level in self._levels.values() for p in level.values()]
        left.extend(p for part in self._retries for p in part if not p.cancelled)
        for pending in left:
            self._leave(pending)
        for level in self._levels.values():
            level.clear()
        self._deadlines.clear()
        self._retries.clear()
        return left

    def _enter(self, pending: Pending) -> None:
        pending.waiting = True
        self._waiting += 1
        self.rows += pending.rows

    def _leave(self, pending: Pending) -> None:
        pending.waiting = False
        self._waiting -= 1
        self.rows -= pending.rows

    def _expire(self, latest_s: float) -> list[Pending]:
        deadlines = self._deadlines
        expired = []
        while deadlines and (not deadlines[0][2].waiting or deadlines[0][0] < latest_s):
            pending = heapq.heappop(deadlines)[2]
            if pending.waiting:
                # A part of a failed batch waits outside of its level.
                self._levels[pending.priority].pop(pending._number, None)
                self._leave(pending)
                expired.append(pending)
        if len(deadlines) > 64 + 2 * self._waiting:
            # Those that were served leave their entry behind; their deadlines may be far off.
            self._deadlines = [entry for entry in deadlines if entry[2].waiting]
            heapq.heapify(self._deadlines)
        return expired

    def _next_retry(self, latest_s: float, expired: list[Pending]) -> tuple[Pending, ...]:
        while self._retries:
            alive = []
            for pending in self._retries.popleft():
                if not pending.waiting:
                    continue
                self._leave(pending)
                if pending.deadline_s < latest_s:
                    expired.append(pending)
                else:
                    alive.append(pending)
            if alive:
                return tuple(alive)
        return _NO_BATCH

    def _in_order(self) -> Iterator[Pending]:
        for priority in self._order:
            yield from self._levels[priority].values()

    def _form(self, now_s: float, floor_s: float) -> tuple[tuple[Pending, ...], float | None]:
        limits = self.limits
        chosen, full = self._choose()
        if limits.max_delay_s > 0.0 and not full:
            # Nobody waits for company longer than half of the time that he can spare.
            due_s = min(
                min(p.arrival_s + limits.max_delay_s, (p.arrival_s + p.deadline_s - floor_s) / 2)
                for p in chosen
            )
            if now_s < due_s:
                return _NO_BATCH, due_s
        for pending in chosen:
            self._leave(pending)
            del self._levels[pending.priority][pending._number]
        return tuple(chosen), None

    def _choose(self) -> tuple[list[Pending], bool]:
        """The next batch, and whether it is full: more rows of its kind could not join it."""
        limits = self.limits
        waiting = self._in_order()
        head = next(waiting)
        # Looking further than a few batches ahead costs more than it brings.
        mates: Iterable[Pending] = (
            p for p in islice(waiting, 4 * limits.max_rows) if p.key == head.key
        )
        if limits.max_cost is not None or limits.max_padding_share < 1.0:
            # Like lengths together waste least. The sort is stable: first come, first served
            # among equals; the head is always in, so nobody waits for ever.
            mates = sorted(mates, key=lambda p: (p.priority, abs(p.length - head.length)))
        chosen = [head]
        rows, longest, true_cost = head.rows, head.length, head.rows * head.length
        refused = False
        for mate in mates:
            if rows >= limits.max_rows:
                break
            new_rows = rows + mate.rows
            new_longest = max(longest, mate.length)
            new_true_cost = true_cost + mate.rows * mate.length
            if not self._fits(new_rows, new_longest, new_true_cost):
                refused = True
                continue
            chosen.append(mate)
            rows, longest, true_cost = new_rows, new_longest, new_true_cost
        full = refused or rows >= limits.max_rows
        if limits.max_cost is not None:
            full = full or (rows + 1) * longest > limits.max_cost
        return chosen, full

    def _fits(self, rows: int, longest: int, true_cost: int) -> bool:
        limits = self.limits
        if rows > limits.max_rows:
            return False
        cost = rows * longest
        if limits.max_cost is not None and cost > limits.max_cost:
            return False
        return 1.0 - true_cost / cost <= limits.max_padding_share
