"""Writes any number of flights as Parquet, CSV or JSON Lines, for batch jobs.

They are the 336,776 flights of 2013, over and over as they are: row i is flight i % 336,776. So the
model says the same of each repeat, and only `row_id` tells repeats apart. Run from the root of the
repository:

    python examples/flights/batch_data.py --rows 10000000 --out data/flights
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import flights_data as data
import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

NUMBERS = ("year", "month", "day", "hour", "minute", "flight", "distance")
FORMATS = ("parquet", "csv", "jsonl")
SAY_EVERY_S = 2.0

BAD_VALUES: tuple[tuple[str, Any], ...] = (
    ("hour", None),
    ("distance", 1e30),
    ("dest", None),
    ("distance", 0.5),
)
"""What bad rows have in turn: a null in a number, more than an int64 holds, a null in a text, and
a fraction where the model takes whole numbers."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=_count, required=True, help="how many flights")
    parser.add_argument("--out", type=Path, required=True, help="folder, new or empty")
    parser.add_argument("--files", type=_count, default=8, help="of about the same size")
    parser.add_argument(
        "--row-group-rows",
        type=_count,
        default=131_072,
        help="of Parquet, and how many rows are in memory at once",
    )
    parser.add_argument("--format", choices=FORMATS, default="parquet")
    parser.add_argument("--seed", type=int, default=0, help="of the places of bad rows")
    parser.add_argument(
        "--bad-rows",
        type=int,
        default=0,
        help="rows that cannot be predicted. `distance` is then float64: no column of int64 can "
        "hold a value that is wrong for one",
    )
    given = parser.parse_args()
    if given.files > given.rows:
        raise SystemExit(f"--files {given.files}: got {given.rows} rows, allowed is one file each")
    if not 0 <= given.bad_rows <= given.rows:
        raise SystemExit(f"--bad-rows {given.bad_rows}: allowed is 0 to --rows, {given.rows}")
    write_flights(
        given.out,
        rows=given.rows,
        files=given.files,
        row_group_rows=given.row_group_rows,
        format=given.format,
        bad=bad_places(given.rows, given.bad_rows, given.seed),
        say=lambda text: print(text, flush=True),
    )


def write_flights(
    out: Path,
    *,
    rows: int,
    files: int,
    row_group_rows: int,
    format: str,
    bad: npt.NDArray[np.int64],
    say: Callable[[str], None],
) -> None:
    """Writes all files to a folder beside `out`, and renames it: there are all of them, or none.

    Args:
        out: New or empty.
        rows: In all.
        files: Of about the same size.
        row_group_rows: Rows of a row group, and of what is in memory at once.
        format: One of `FORMATS`.
        bad: Which rows are spoilt, ascending.
        say: Takes progress.

    Raises:
        SystemExit: `out` holds something already; says how to go on.
    """
    out = out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SystemExit(f"{out} is there and not empty. Remove it, or choose another --out")
    table = flights_table(spoilable=bool(len(bad)))
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    began_s = said_s = time.monotonic()
    try:
        for number in range(files):
            start, stop = rows * number // files, rows * (number + 1) // files
            file = temporary / f"flights-{number:05d}.{format}"
            with open_sink(file, format, number_rows(table, 0, 0).schema) as sink:
                for first in range(start, stop, row_group_rows):
                    last = min(first + row_group_rows, stop)
                    sink.write_table(spoil(number_rows(table, first, last), first, bad))
                    now_s = time.monotonic()
                    if now_s - said_s >= SAY_EVERY_S or last == rows:
                        rate = last / max(now_s - began_s, 1e-9)
                        say(f"{last:,} of {rows:,} rows, {rate:,.0f} rows/s")
                        said_s = now_s
        size_bytes = sum(file.stat().st_size for file in temporary.iterdir())
        temporary.replace(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    say(f"{files} files, {size_bytes / 1e6:,.1f} MB, {len(bad):,} bad rows: {out}")


def flights_table(*, spoilable: bool) -> pa.Table:
    """All flights once, in the order of the data: `NUMBERS`, the model's texts, and `delayed`.

    Args:
        spoilable: Whether `distance` is float64, which holds every value that it has exactly.
    """
    flights = data.load_flights()
    columns = {name: pa.array(flights[name].to_numpy(np.int64)) for name in NUMBERS}
    if spoilable:
        columns["distance"] = columns["distance"].cast(pa.float64())
    for name in data.STRINGS:
        columns[name] = pa.array(flights[name].tolist(), pa.string())
    flown = data.was_flown(flights)
    columns["delayed"] = pa.array(data.was_delayed(flights), mask=~flown)
    return pa.table(columns)


def number_rows(table: pa.Table, start: int, stop: int) -> pa.Table:
    """The rows `start` to `stop` of the endless repetition of a table, with their `row_id`."""
    row_id = np.arange(start, stop, dtype=np.int64)
    return table.take(pa.array(row_id % table.num_rows)).add_column(0, "row_id", pa.array(row_id))


def bad_places(rows: int, count: int, seed: int) -> npt.NDArray[np.int64]:
    """Drawn by lot, one from each of `count` equal stretches: ascending, none twice."""
    edges = np.array([rows * index // max(count, 1) for index in range(count + 1)], np.int64)
    return np.random.default_rng(seed).integers(edges[:-1], edges[1:], dtype=np.int64)


def spoil(table: pa.Table, start: int, bad: npt.NDArray[np.int64]) -> pa.Table:
    """Puts `BAD_VALUES` into rows.

    Args:
        table: Rows from `start` on.
        start: The `row_id` of its first row.
        bad: Every bad row, by `row_id`, ascending. The n-th has the same fault whatever the
            tables are that rows come in.
    """
    first, last = np.searchsorted(bad, [start, start + table.num_rows])
    for kind, (name, value) in enumerate(BAD_VALUES):
        of_kind = bad[first:last][np.arange(first, last) % len(BAD_VALUES) == kind] - start
        if not len(of_kind):
            continue
        mask = np.zeros(table.num_rows, bool)
        mask[of_kind] = True
        index = table.schema.get_field_index(name)
        column = table.column(index)
        spoilt = pc.if_else(pa.array(mask), pa.scalar(value, column.type), column)
        table = table.set_column(index, name, spoilt)
    return table


class Sink(Protocol):
    """Takes tables of one schema."""

    def write_table(self, table: pa.Table) -> None:
        """Adds rows."""


@contextlib.contextmanager
def open_sink(file: Path, format: str, schema: pa.Schema) -> Iterator[Sink]:
    """A file of one of the three formats."""
    if format == "parquet":
        with pq.ParquetWriter(file, schema, compression="zstd") as writer:
            yield writer
    elif format == "csv":
        with pa_csv.CSVWriter(file, schema) as writer:
            yield writer
    else:
        with file.open("wb") as stream:
            yield JsonLines(stream)


class JsonLines:
    """Writes tables as JSON Lines; nulls stay, as `null`."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write_table(self, table: pa.Table) -> None:
        """Adds rows."""
        for batch in table.to_batches(max_chunksize=16_384):
            self._stream.writelines(
                orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in batch.to_pylist()
            )


def _count(text: str) -> int:
    value = int(text.replace("_", "").replace(",", ""))
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: allowed is 1 or more")
    return value


if __name__ == "__main__":
    main()
