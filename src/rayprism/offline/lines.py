"""Cuts text files into lines.

A line belongs to the byte range in which its first byte lies, and what becomes of it depends on
that line alone: any cut of a file gives the same rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

__all__ = [
    "BOM",
    "BadRow",
    "Integers",
    "Lines",
    "RowBatch",
    "cut_lines",
    "cut_records",
    "find_line",
    "is_utf8",
    "match_record",
    "only_utf8",
]

BOM: Final = b"\xef\xbb\xbf"
BLOCK_BYTES = 1 << 21
# One line is held whole in memory: this bounds what a file without line ends can take.
MAX_LINE_BYTES = 1 << 24
_TAIL_BYTES = 1 << 16

Read = Callable[[int], bytes]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that could not be read.

    Args:
        position: Byte offset of its line; of an image, which file of the listing it is.
        reason: For the dead letters; holds nothing of the row itself.
    """

    position: int
    reason: str


@dataclass(frozen=True, slots=True)
class RowBatch:
    """Rows of one file, in its order; of images, one row of each file.

    Args:
        table: The columns that were asked for, in that order.
        positions: `[rows] int64`: row in the file (Parquet), byte offset of the line, or which
            file of the listing it is (images).
        bad: What could not even be parsed, and is not in `table`.
    """

    table: pa.Table
    positions: Integers
    bad: list[BadRow]


@dataclass(frozen=True, slots=True)
class Lines:
    """Whole lines of a file, in its order.

    Args:
        data: Their bytes, one after the other, line ends included.
        starts: `[lines] int64`: where in `data` each begins; it ends where the next one begins.
        positions: `[lines] int64`: byte offset of each in the file.
        bad: Lines that were too long to be held.
    """

    data: bytes
    starts: Integers
    positions: Integers
    bad: list[BadRow] = field(default_factory=list)

    @classmethod
    def of(cls, data: bytes, offset: int, starts: Integers | None = None) -> Lines:
        """The lines of what lies at `offset` in the file; by default, cut at each line end."""
        if starts is None:
            ends = np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n")) + 1
            starts = np.append(0, ends[ends < len(data)])
        lines = cls(data, starts, starts + offset)
        if len(data) <= MAX_LINE_BYTES:
            return lines
        fits = lines.lengths() <= MAX_LINE_BYTES
        bad = [_too_long(position) for position in lines.positions[~fits].tolist()]
        return lines.only(fits, bad)

    def __len__(self) -> int:
        return len(self.starts)

    def stops(self) -> Integers:
        """Where in `data` each line ends, its line end included."""
        return np.append(self.starts[1:], len(self.data))[: len(self)]

    def lengths(self) -> Integers:
        """Bytes of each, its line end included."""
        return self.stops() - self.starts

    def only(self, wanted: npt.NDArray[np.bool_], bad: Sequence[BadRow] = ()) -> Lines:
        """Some of the lines; of the others, what is to be said of them."""
        bad = [*self.bad, *bad]
        if wanted.all():
            return Lines(self.data, self.starts, self.positions, bad)
        starts, stops = self.starts[wanted], self.stops()[wanted]
        parts = zip(starts.tolist(), stops.tolist(), strict=True)
        data = b"".join(self.data[start:stop] for start, stop in parts)
        lengths = stops - starts
        return Lines(data, np.cumsum(lengths) - lengths, self.positions[wanted], bad)

    def without_bom(self) -> Lines:
        """Without the mark that a file of UTF-8 may begin with."""
        if not self.data.startswith(BOM):
            return self
        starts = np.maximum(self.starts - len(BOM), 0)
        return Lines(self.data[len(BOM) :], starts, self.positions, self.bad)

    def part(self, start: int, stop: int) -> bytes:
        """The bytes of lines that follow each other, by their numbers."""
        end = int(self.starts[stop]) if stop < len(self) else len(self.data)
        return self.data[int(self.starts[start]) : end]


def find_line(file: Any, start: int, stop: int) -> int:
    """The offset of the first line that begins at or after `start`; `stop` or more: there is none.

    Args:
        file: Open for reading, and seekable.
        start: At least 1.
        stop: Where the search may end.
    """
    at = start - 1
    file.seek(at)
    while at < stop:
        chunk = file.read(_TAIL_BYTES)
        if not chunk:
            return stop
        found = chunk.find(b"\n")
        if found >= 0:
            return at + int(found) + 1
        at += len(chunk)
    return stop


def cut_lines(read: Read, begin: int, stop: int) -> Iterator[Lines]:
    r"""Cuts what follows into lines, up to the last one that begins before `stop`.

    Args:
        read: Gives the next bytes of the file, from `begin` on; none at its end.
        begin: Where a line begins.
        stop: Byte offset. Lines end with `\n`; the last one of a file need not.
    """
    data, offset = b"", begin
    while offset < stop:
        left = stop - offset - len(data)
        chunk = read(min(max(left, _TAIL_BYTES), BLOCK_BYTES))
        data += chunk
        if not chunk:
            if data:
                yield Lines.of(data, offset)
            return
        if offset + len(data) >= stop:
            end = data.find(b"\n", max(stop - 1 - offset, 0)) + 1
            if end:
                yield Lines.of(data[:end], offset)
                return
        cut = data.rfind(b"\n") + 1
        if cut:
            yield Lines.of(data[:cut], offset)
            offset, data = offset + cut, data[cut:]
        if len(data) > MAX_LINE_BYTES:
            none = np.empty(0, np.int64)
            yield Lines(b"", none, none, [_too_long(offset)])
            offset, data = _skip_line(read, offset + len(data))


def cut_records(read: Read, begin: int, delimiter: str) -> Iterator[Lines]:
    """Cuts the rest of a file into records of CSV, in which a quoted value may hold line ends.

    A quote that is never closed costs its own line only: the next line is read as a new record.

    Args:
        read: Gives the next bytes of the file, from `begin` on; none at its end.
        begin: Where a record begins.
        delimiter: One character.
    """
    match = match_record(delimiter)
    data, offset, final = b"", begin, False
    while not final:
        chunk = read(BLOCK_BYTES)
        final = not chunk
        data += chunk
        if final and data and not data.endswith(b"\n"):
            data += b"\n"
        starts, at = [], 0
        while at < len(data):
            found = match(data, at)
            if found is None and not final and len(data) - at <= MAX_LINE_BYTES:
                break
            starts.append(at)
            # Without a match a quote is open to the end: the parser will say so of this line.
            at = found.end() if found else data.find(b"\n", at) + 1 or len(data)
        yield Lines.of(data[:at], offset, np.array(starts, np.int64))
        offset, data = offset + at, data[at:]


def match_record(
    delimiter: str, *, strict: bool = False
) -> Callable[[bytes, int], re.Match[bytes] | None]:
    """What finds the record of CSV that begins at an offset; nothing where it does not end.

    Args:
        delimiter: One character.
        strict: No carriage return may stand in it, but for quoted ones and at its end.
    """
    mark = re.escape(delimiter.encode())
    other = rb"[^%b%b\n]*+" % (mark, rb"\r" if strict else b"")
    # A quote is one only where a value begins. Possessive: a record is found in one pass.
    value = rb'(?:"[^"]*+(?:""[^"]*+)*+"|(?!"))' + other
    return re.compile(rb"%b(?:%b%b)*+\r*\n" % (value, mark, value)).match


def _too_long(position: int) -> BadRow:
    return BadRow(position, f"the line is longer than {MAX_LINE_BYTES:,} bytes")


def _skip_line(read: Read, offset: int) -> tuple[int, bytes]:
    """Reads to the end of a line: the offset of the next one, and what was read of it."""
    while chunk := read(BLOCK_BYTES):
        end = chunk.find(b"\n") + 1
        if end:
            return offset + end, chunk[end:]
        offset += len(chunk)
    return offset, b""


def only_utf8(lines: Lines) -> Lines:
    """The lines that are UTF-8; the others are bad rows."""
    if lines.data.isascii() or is_utf8(lines.data):
        return lines
    good = np.array([is_utf8(lines.part(at, at + 1)) for at in range(len(lines))], np.bool_)
    bad = [BadRow(position, "not UTF-8") for position in lines.positions[~good].tolist()]
    return lines.only(good, bad)


def is_utf8(data: bytes) -> bool:
    """Whether these bytes are UTF-8 text."""
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
