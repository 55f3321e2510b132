"""Tells a person how far a job is."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import TextIO

from rayprism.core.shards import Progress, Shard
from rayprism.offline.commits import Totals
from rayprism.offline.worker import Outcome

__all__ = ["Reporter", "describe_s"]

_LOG_EVERY_S = 10.0
_TERMINAL_EVERY_S = 0.5


class Reporter:
    """Counts what is done, and writes a line about it once in a while.

    In a terminal the line is written over; in a log each is a new one.

    Args:
        shards: Of the whole job.
        done: Numbers of those that earlier runs have done.
        totals: Of what earlier runs have done.
        stream: Where to; by default standard error.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        done: set[int],
        totals: Totals,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream or sys.stderr
        self._over = self._stream.isatty()
        self._clock = clock
        self._by_rows = all(shard.rows is not None for shard in shards)
        self._shards = {shard.number: shard for shard in shards}
        sizes = {shard.number: self._size(shard) for shard in shards}
        self._work = Progress(sum(sizes.values()), sum(sizes[number] for number in done))
        self._rows = Progress(0, totals.rows_in)
        self._began_s = clock()
        self._told_s = self._began_s
        self.dead_letters = totals.dead_letters
        """Of the whole job so far."""
        self.peak_rss_bytes = 0
        """Of any actor so far."""
        self._work.start(self._began_s)
        self._rows.start(self._began_s)

    @property
    def elapsed_s(self) -> float:
        """Since it was made."""
        return self._clock() - self._began_s

    @property
    def rows(self) -> int:
        """Rows of the input that are done, by this run and by earlier ones."""
        return self._rows.done

    def take(self, outcome: Outcome) -> None:
        """A shard is done, or failed."""
        self.peak_rss_bytes = max(self.peak_rss_bytes, outcome.rss_bytes)
        if outcome.error is not None:
            return
        now_s = self._clock()
        self._work.add(self._size(self._shards[outcome.shard]), now_s)
        self._rows.add(outcome.rows_in, now_s)
        self.dead_letters += outcome.dead_letters
        every_s = _TERMINAL_EVERY_S if self._over else _LOG_EVERY_S
        if now_s - self._told_s >= every_s:
            self._told_s = now_s
            self._write(self.line(now_s), over=self._over)

    def say(self, text: str) -> None:
        """Writes something else."""
        self._write(text, over=False)

    def line(self, now_s: float) -> str:
        """How far it is."""
        share = self._work.done / self._work.total if self._work.total else 1.0
        left_s = self._work.left_s(now_s)
        of = f" of {self._work.total:,}" if self._by_rows else ""
        return "  ".join(
            (
                f"[{describe_s(now_s - self._began_s)}]",
                f"{self._rows.done:,}{of} rows",
                f"{share:.1%}",
                f"{self._rows.rate(now_s):,.0f} rows/s",
                "time left unknown" if left_s is None else f"{describe_s(left_s)} left",
                f"{self.dead_letters:,} dead letters",
            )
        )

    def _size(self, shard: Shard) -> int:
        if self._by_rows and shard.rows is not None:
            return shard.rows
        return shard.stop - shard.start

    def _write(self, text: str, *, over: bool) -> None:
        start, end = ("\r\x1b[K", "") if over else (("\r\x1b[K" if self._over else ""), "\n")
        self._stream.write(f"{start}{text}{end}")
        self._stream.flush()


def describe_s(seconds: float) -> str:
    """A duration as `1:02:03` or `2:03`."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"
