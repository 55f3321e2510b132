"""Makes tables of the lines of CSV files.

Lines are parsed by Arrow in bulk. A bulk in which a line would run into the next one is halved
until that line stands alone, so that what a line becomes does not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
from pyarrow import fs as pa_fs

from rayprism.offline.filesystems import read_head
from rayprism.offline.lines import (
    BOM,
    BadRow,
    Integers,
    Lines,
    RowBatch,
    is_utf8,
    match_record,
    only_utf8,
)

__all__ = ["CsvParser", "csv_header", "read_header"]

_HEAD_BYTES = 1 << 16
_MOST_HEAD_BYTES = 1 << 20

_ZERO: Integers = np.zeros(1, np.int64)
_UNCLOSED = "a quote is opened and not closed on its line"
_CARRIAGE_RETURN = "a carriage return stands inside the line"


def csv_header(head: bytes, delimiter: str, quoted_newlines: bool) -> tuple[list[str], int] | None:
    """The column names of a CSV file, and the offset of what comes after them.

    Args:
        head: The first bytes of the file, or all of them.
        delimiter: One character.
        quoted_newlines: Whether a quoted name may hold line ends.

    Returns:
        None where the header does not end in `head`; no names where `head` holds nothing at all.

    Raises:
        ValueError: It is no header, with what it is.
    """
    at = len(BOM) if head.startswith(BOM) else 0
    while head[at : at + 1] in (b"\r", b"\n") and head[at : at + 1]:
        at += 1
    if at == len(head):
        return [], at
    end = head.find(b"\n", at) + 1
    if quoted_newlines and end:
        found = match_record(delimiter)(head, at)
        end = found.end() if found else 0
    if not end:
        return None
    line = head[at:end].rstrip(b"\r\n")
    if b"\r" in line and b'"' not in line:
        raise ValueError(
            "its lines end with carriage returns alone: they must end with \\n or \\r\\n"
        )
    if not is_utf8(line) or b"\0" in line:
        raise ValueError("its first line is not UTF-8 text")
    width = 1

    def count(row: pa_csv.InvalidRow) -> str:
        nonlocal width
        width = row.actual_columns
        return "skip"

    # One column is expected: of any other number the handler is told.
    _read_csv(line, 1, [0], delimiter, count)
    columns = {str(index): index for index in range(width)}
    names = CsvParser(width, columns, delimiter).parse(Lines(line, _ZERO, _ZERO))
    if names.bad:
        raise ValueError(f"its first line is no header: {names.bad[0].reason}")
    return [column[0].as_py() or "" for column in names.table.columns], end


def read_header(
    filesystem: pa_fs.FileSystem, path: str, delimiter: str, quoted_newlines: bool
) -> tuple[list[str], int]:
    """Reads the column names of a CSV file, and where its rows begin; no names: it is empty.

    Raises:
        ValueError: It has no header, with what is there.
        OSError: It cannot be read.
    """
    size = _HEAD_BYTES
    while True:
        head = read_head(filesystem, path, size)
        if len(head) < size and not head.endswith(b"\n"):
            head += b"\n"
        found = csv_header(head, delimiter, quoted_newlines)
        if found is not None:
            return found
        if len(head) < size or size >= _MOST_HEAD_BYTES:
            raise ValueError(
                f"its header does not end within {len(head):,} bytes, or a quote is open in it"
            )
        size *= 4


class CsvParser:
    """Makes tables of strings of the lines of a CSV file.

    An empty value is a null, and a quoted empty one an empty string.

    Args:
        width: Columns of the header.
        columns: Which ones to take: name to index.
        delimiter: One character.
    """

    def __init__(self, width: int, columns: Mapping[str, int], delimiter: str) -> None:
        self._width = width
        self._columns = columns
        # Something has to be read for rows to be counted.
        self._indices = list(dict.fromkeys(self._columns.values())) or [0]
        self._delimiter = delimiter
        self._match_strict = match_record(delimiter, strict=True)

    def parse(self, lines: Lines) -> RowBatch:
        """Parses lines; each alone decides what becomes of it."""
        lines = _not_empty(only_utf8(lines))
        bad = lines.bad
        tables: list[pa.Table] = []
        kept: list[Integers] = []
        # Halves wait here, the first one on top.
        waiting = [(0, len(lines))] if len(lines) else []
        while waiting:
            start, stop = waiting.pop()
            parsed = self._attempt(lines.part(start, stop), stop - start)
            if parsed is not None:
                table, faults = parsed
                keep = np.ones(stop - start, np.bool_)
                keep[list(faults)] = False
                tables.append(table)
                kept.append(lines.positions[start:stop][keep])
                bad += [BadRow(int(lines.positions[start + at]), faults[at]) for at in faults]
            elif stop - start > 1:
                middle = (start + stop) // 2
                waiting += [(middle, stop), (start, middle)]
            else:
                line = lines.part(start, stop)
                reason = _UNCLOSED if b'"' in line else _CARRIAGE_RETURN
                bad.append(BadRow(int(lines.positions[start]), reason))
        positions = np.concatenate(kept) if kept else np.empty(0, np.int64)
        bad.sort(key=lambda row: row.position)
        return RowBatch(self._named(tables, len(positions)), positions, bad)

    def _attempt(self, data: bytes, count: int) -> tuple[pa.Table, dict[int, str]] | None:
        """Rows and faults by line; None where the lines are not one row each."""
        end = b"" if data.endswith(b"\n") else b"\n"
        if data.count(b"\r") != data.count(b"\r\n"):
            # A lone carriage return ends a row for Arrow, unless it is quoted.
            record = self._match_strict(data + end, 0) if count == 1 else None
            if record is None or record.end() != len(data + end):
                return None
        faults: dict[int, str] = {}

        def note(row: pa_csv.InvalidRow) -> str:
            got, allowed = row.actual_columns, row.expected_columns
            faults[row.number - 1] = f"the line has {got} columns, the header {allowed}"
            return "skip"

        # A last line of ours: a quote that is left open swallows it, and it is missed.
        mark = self._delimiter.join("0" * self._width).encode() + b"\n"
        table = _read_csv(data + end + mark, self._width, self._indices, self._delimiter, note)
        if table.num_rows + len(faults) != count + 1:
            return None
        return table.slice(0, count - len(faults)), faults

    def _named(self, tables: list[pa.Table], count: int) -> pa.Table:
        if not self._columns:
            return pa.table({})
        if not tables:
            return pa.table({name: pa.array([], pa.string()) for name in self._columns})
        table = pa.concat_tables(tables)
        return pa.table({name: table[str(at)] for name, at in self._columns.items()})


def _not_empty(lines: Lines) -> Lines:
    firsts = np.frombuffer(lines.data, np.uint8)[lines.starts]
    empty = np.isin(firsts, (ord("\r"), ord("\n")))
    if not empty.any():
        return lines
    texts = [lines.part(at, at + 1) for at in np.flatnonzero(empty).tolist()]
    empty[empty] = [not text.strip(b"\r\n") for text in texts]
    return lines.only(~empty)


def _read_csv(
    data: bytes,
    width: int,
    indices: Sequence[int],
    delimiter: str,
    on_bad: Callable[[Any], str],
) -> pa.Table:
    if data.startswith(BOM):
        # Arrow takes one away, wherever in the file these bytes come from.
        data = BOM + data
    wanted = [str(at) for at in indices]
    return pa_csv.read_csv(
        pa.BufferReader(data),
        read_options=pa_csv.ReadOptions(
            use_threads=False,
            block_size=len(data) + 1,
            column_names=[str(at) for at in range(width)],
        ),
        parse_options=pa_csv.ParseOptions(delimiter=delimiter, invalid_row_handler=on_bad),
        convert_options=pa_csv.ConvertOptions(
            include_columns=wanted,
            column_types=dict.fromkeys(wanted, pa.string()),
            null_values=[""],
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
        ),
    )
