"""Cuts the input of a batch job into shards, and tells how far a job is.

A shard is what is done, and committed, as a whole. The same files give the same shards: what was
committed by one run is known by its number to the next.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["FileFacts", "Progress", "Shard", "Unit", "listing_digest", "plan_shards"]

Unit = Literal["row_groups", "bytes", "files"]


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What has to be known of an input file to cut it.

    Args:
        path: Relative to the input, with `/`.
        size_bytes: Of the file.
        row_groups: Rows of each row group, of a Parquet file; empty for other formats.
        splittable: Whether a text file may be cut at any line.
    """

    path: str
    size_bytes: int
    row_groups: tuple[int, ...] = ()
    splittable: bool = False


@dataclass(frozen=True, slots=True)
class Shard:
    """A part of the input.

    Args:
        number: From 0, in the order of the input.
        file: Index of its file in the listing; of its first one where `unit` is `files`.
        start: First row group, byte or file of it.
        stop: The one after the last.
        unit: What `start` and `stop` count. Bytes: the lines that begin in it belong to it.
        rows: How many, where that is known beforehand.
    """

    number: int
    file: int
    start: int
    stop: int
    unit: Unit
    rows: int | None = None


def plan_shards(
    files: Sequence[FileFacts],
    *,
    target_rows: int,
    target_bytes: int,
    files_per_shard: int | None = None,
) -> list[Shard]:
    """Cuts files into shards of about the same size.

    Args:
        files: In the order of the input.
        target_rows: Most rows of a Parquet shard, unless a single row group has more.
        target_bytes: Most bytes of a shard of a text file that may be cut.
        files_per_shard: Where each file is one row (images): so many make a shard.
    """
    if files_per_shard is not None:
        count = len(files)
        return [
            Shard(number, start, start, stop, "files", stop - start)
            for number, start in enumerate(range(0, count, files_per_shard))
            for stop in [min(start + files_per_shard, count)]
        ]
    shards: list[Shard] = []
    for index, facts in enumerate(files):
        if facts.row_groups:
            parts: Iterator[tuple[int, int, int | None]] = _row_groups(
                facts.row_groups, target_rows
            )
            unit: Unit = "row_groups"
        else:
            parts = _byte_ranges(facts, target_bytes)
            unit = "bytes"
        for start, stop, rows in parts:
            shards.append(Shard(len(shards), index, start, stop, unit, rows))
    return shards


def _row_groups(
    row_groups: Sequence[int], target_rows: int
) -> Iterator[tuple[int, int, int | None]]:
    start, rows = 0, 0
    for index, count in enumerate(row_groups):
        if index > start and rows + count > target_rows:
            yield start, index, rows
            start, rows = index, 0
        rows += count
    yield start, len(row_groups), rows


def _byte_ranges(facts: FileFacts, target_bytes: int) -> Iterator[tuple[int, int, int | None]]:
    size = facts.size_bytes
    if not facts.splittable or size <= target_bytes:
        yield 0, size, None
        return
    count = -(-size // target_bytes)
    # Even parts: no small rest that costs a whole start.
    for index in range(count):
        yield size * index // count, size * (index + 1) // count, None


def listing_digest(files: Sequence[FileFacts]) -> str:
    """What an input is recognised by: names, sizes and row groups of its files, in order."""
    digest = hashlib.sha256()
    for facts in files:
        line = [facts.path, facts.size_bytes, list(facts.row_groups)]
        digest.update(json.dumps(line, separators=(",", ":")).encode() + b"\n")
    return f"sha256:{digest.hexdigest()}"


class Progress:
    """How fast a job is, and when it will be done.

    Args:
        total: Of whatever is counted (rows where they are known, else bytes or shards).
        done: What earlier runs have done already: it says nothing of the speed of this one.
        window_s: The speed is that of this last while.
    """

    def __init__(self, total: int, done: int = 0, window_s: float = 60.0) -> None:
        self.total = total
        self.done = done
        self._window_s = window_s
        self._seen: deque[tuple[float, int]] = deque()

    def start(self, now_s: float) -> None:
        """The clock runs from here."""
        self._seen.append((now_s, self.done))

    def add(self, amount: int, now_s: float) -> None:
        """So much more is done."""
        self.done += amount
        self._seen.append((now_s, self.done))
        while len(self._seen) > 2 and now_s - self._seen[1][0] >= self._window_s:
            self._seen.popleft()

    def rate(self, now_s: float) -> float:
        """How much a second; 0 where nothing is known yet."""
        if not self._seen:
            return 0.0
        since_s, before = self._seen[0]
        return (self.done - before) / (now_s - since_s) if now_s > since_s else 0.0

    def left_s(self, now_s: float) -> float | None:
        """Seconds until it is done, at this speed; None where nothing is known yet."""
        rate = self.rate(now_s)
        return (self.total - self.done) / rate if rate > 0 else None
