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

__all__ = [
    "FileFacts",
    "Progress",
    "Shard",
    "Unit",
    "listing_digest",
    "plan_digest",
    "plan_shards",
]

Unit = Literal["row_groups", "rows", "bytes", "files"]

_MOST_TARGETS = 8


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What has to be known of an input file to cut it.

    Args:
        path: Relative to the input, with `/`.
        size_bytes: Of the file.
        row_groups: Rows of each row group, of a Parquet file, which may have none; None for other
            formats.
        splittable: Whether a text file may be cut at any line.
    """

    path: str
    size_bytes: int
    row_groups: tuple[int, ...] | None = None
    splittable: bool = False


@dataclass(frozen=True, slots=True)
class Shard:
    """A part of the input.

    Args:
        number: From 0, in the order of the input.
        file: Index of its file in the listing; of its first one where `unit` is `files`.
        start: First row group, row, byte or file of it.
        stop: The one after the last.
        unit: What `start` and `stop` count. Rows: of the whole file. Bytes: the lines that begin
            in it belong to it.
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
    folders: Sequence[str] | None = None,
) -> list[Shard]:
    """Cuts files into shards of about the same size. An empty file has none.

    Neighbouring row groups make one shard as long as they have no more than `target_rows`. One that
    has more stays whole, up to 8 times as many; above, it is cut by rows into as few even parts as
    keep to that. Parquet cannot seek to a row: each part decodes what lies before it as well, and n
    parts decode a row group (n + 1) / 2 times. That is paid only where a shard would be longer by
    an order of magnitude than was asked for: pyarrow writes row groups of a million rows, which
    a model that does 500 rows a second has for half an hour.

    Args:
        files: In the order of the input.
        target_rows: Rows of a Parquet shard; no shard has more than 8 times as many.
        target_bytes: Most bytes of a shard of a text file that may be cut.
        files_per_shard: Where each file is one row (images): so many make a shard.
        folders: Where each file is one row: the folder of the output that each file's row goes
            to. A shard has files of one folder. By default they all go to one.

    Raises:
        ValueError: A target below 1, with which nothing could be cut.
    """
    targets = {
        "target_rows": target_rows,
        "target_bytes": target_bytes,
        "files_per_shard": files_per_shard,
    }
    for name, value in targets.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}, allowed is 1 or more")
    if files_per_shard is not None:
        runs = _file_runs(len(files), files_per_shard, folders)
        return [
            Shard(number, start, start, stop, "files", stop - start)
            for number, (start, stop) in enumerate(runs)
        ]
    shards: list[Shard] = []
    for index, facts in enumerate(files):
        if facts.row_groups is not None:
            parts = _row_groups(facts.row_groups, target_rows)
        else:
            parts = _byte_ranges(facts, target_bytes)
        for start, stop, unit, rows in parts:
            shards.append(Shard(len(shards), index, start, stop, unit, rows))
    return shards


_Parts = Iterator[tuple[int, int, Unit, int | None]]


def _file_runs(
    count: int, files_per_shard: int, folders: Sequence[str] | None
) -> Iterator[tuple[int, int]]:
    start = 0
    for index in range(1, count + 1):
        ends = index == count or (folders is not None and folders[index] != folders[start])
        if ends or index - start == files_per_shard:
            yield start, index
            start = index


def _row_groups(row_groups: Sequence[int], target_rows: int) -> _Parts:
    most = _MOST_TARGETS * target_rows
    start, rows, begin = 0, 0, 0
    for index, count in enumerate(row_groups):
        if index > start and rows + count > target_rows:
            yield start, index, "row_groups", rows
            start, rows = index, 0
        if count > most:
            for first, stop in _even_parts(count, most):
                yield begin + first, begin + stop, "rows", stop - first
            start = index + 1
        else:
            rows += count
        begin += count
    if start < len(row_groups):
        yield start, len(row_groups), "row_groups", rows


def _even_parts(size: int, most: int) -> Iterator[tuple[int, int]]:
    """As few parts as are no larger than `most`, and no small rest that costs a whole start."""
    count = -(-size // most)
    for index in range(count):
        yield size * index // count, size * (index + 1) // count


def _byte_ranges(facts: FileFacts, target_bytes: int) -> _Parts:
    size = facts.size_bytes
    if size == 0:
        return
    if not facts.splittable:
        yield 0, size, "bytes", None
        return
    for start, stop in _even_parts(size, target_bytes):
        yield start, stop, "bytes", None


def listing_digest(files: Sequence[FileFacts]) -> str:
    """What an input is recognised by: names, sizes and row groups of its files, in order."""
    digest = hashlib.sha256()
    for facts in files:
        digest.update(_line([facts.path, facts.size_bytes, facts.row_groups]))
    return f"sha256:{digest.hexdigest()}"


def plan_digest(shards: Sequence[Shard]) -> str:
    """What a plan is recognised by: shard 7 of another plan is another part of the input.

    The same files are cut differently by other targets, and may be by another release of this
    module.
    """
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(_line([shard.number, shard.file, shard.start, shard.stop, shard.unit]))
    return f"sha256:{digest.hexdigest()}"


def _line(values: list[object]) -> bytes:
    return json.dumps(values, separators=(",", ":")).encode() + b"\n"


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
        """The clock runs from here: what is added before has no time that it took."""
        self._seen.clear()
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
        if self.done >= self.total:
            return 0.0
        rate = self.rate(now_s)
        return (self.total - self.done) / rate if rate > 0 else None
