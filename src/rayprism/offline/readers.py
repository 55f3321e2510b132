"""Reads the rows of a shard, a batch at a time."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pa_fs

from rayprism.core.shards import Shard
from rayprism.errors import SetupError
from rayprism.offline.csv_lines import CsvParser, read_header
from rayprism.offline.files import Listing, partition_values
from rayprism.offline.filesystems import open_text, read_head, reading
from rayprism.offline.image_reader import read_images
from rayprism.offline.json_lines import JsonParser
from rayprism.offline.lines import (
    BOM,
    BadRow,
    Lines,
    RowBatch,
    cut_lines,
    cut_records,
    find_line,
)

__all__ = ["BadRow", "RowBatch", "read_shard"]

# A column chunk is read in pieces of this size, and not as a whole; over a network in larger ones.
_LOCAL_BUFFER_BYTES = 1 << 18
_REMOTE_BUFFER_BYTES = 1 << 21
_SMALL_DICTIONARY_BYTES = 1 << 13


def read_shard(
    listing: Listing,
    shard: Shard,
    columns: Sequence[str],
    batch_rows: int,
    *,
    use_threads: bool = False,
    image_threads: int = 1,
    as_categories: bool = False,
) -> Iterator[RowBatch]:
    """Reads a shard, each row of it once and in order.

    A shard of Parquet is streamed: what is in memory does not grow with the row group. Of a text
    file a few MiB are held at once, or the longest line. Of images 64 MiB of pixels are, or
    a single one that has more.

    Args:
        listing: From `list_inputs`.
        shard: From `plan_shards` over the files of the listing.
        columns: Of the listing's schema; the batches have exactly these, with the listing's types.
        batch_rows: Most rows of a batch; of images, fewer are in one where they are large.
        use_threads: Whether Arrow may decode columns of Parquet in parallel.
        image_threads: How many images are decoded at once.
        as_categories: Whether columns of text that Parquet holds as few different values come as
            dictionaries of them. They have not quite the listing's types, then.

    Yields:
        Batches; one may have no rows, where there are bad ones to be told.

    Raises:
        SetupError: The file cannot be read, or is not the one that was listed. A single image is
            no reason: it is a bad row.
    """
    if listing.format == "images":
        yield from read_images(listing, shard, columns, batch_rows, image_threads)
        return
    index = shard.file
    values = partition_values(listing.files[index].path)
    partitions = {
        name: pa.scalar(values.get(name), pa.string()).cast(listing.schema.field(name).type)
        for name in listing.partitions
        if name in columns
    }
    own = [listing.schema.field(name) for name in columns if name not in partitions]
    if listing.format == "parquet":
        batches = _read_parquet(listing, shard, own, batch_rows, use_threads, as_categories)
    else:
        batches = _rebatch(_read_text(listing, shard, own), batch_rows)
    with closing(batches):
        for batch in batches:
            rows = len(batch.positions)
            arrays = {name: pa.repeat(scalar, rows) for name, scalar in partitions.items()}
            table = pa.table(
                {name: arrays[name] if name in arrays else batch.table[name] for name in columns}
            )
            yield RowBatch(table, batch.positions, batch.bad)


def _changed(listing: Listing, index: int, got: str, was: str) -> SetupError:
    return SetupError(
        f"{listing.path(index)} is not the file that was listed: it has {got}, it had {was}. "
        "Mend: leave the input alone while a job runs; --restart begins anew with what it is now"
    )


def _open_parquet(
    filesystem: Any, path: str, local: bool, encoded: Sequence[str] | None
) -> pq.ParquetFile:
    return pq.ParquetFile(
        path,
        filesystem=filesystem,
        buffer_size=_LOCAL_BUFFER_BYTES if local else _REMOTE_BUFFER_BYTES,
        read_dictionary=encoded,
    )


def _categories(file: pq.ParquetFile, fields: Sequence[pa.Field]) -> list[str]:
    """Columns of text with few different values: those of each row group fit a small dictionary."""
    texts = {item.name for item in fields if pa.types.is_string(item.type)}
    metadata, schema = file.metadata, file.schema_arrow
    found = {name for name in texts if name in schema.names}
    found = {name for name in found if pa.types.is_string(schema.field(name).type)}
    for group in range(metadata.num_row_groups):
        for index in range(metadata.num_columns):
            column = metadata.row_group(group).column(index)
            start = column.dictionary_page_offset
            if start is None or column.data_page_offset - start > _SMALL_DICTIONARY_BYTES:
                found.discard(column.path_in_schema)
    return sorted(found)


def _read_parquet(
    listing: Listing,
    shard: Shard,
    fields: Sequence[pa.Field],
    batch_rows: int,
    use_threads: bool,
    as_categories: bool,
) -> Generator[RowBatch, None, None]:
    path, counts = listing.path(shard.file), listing.files[shard.file].row_groups or ()
    filesystem = listing.open()
    local = isinstance(filesystem, pa_fs.LocalFileSystem)
    with reading(path):
        file = _open_parquet(filesystem, path, local, None)
    with contextlib.ExitStack() as stack:
        stack.enter_context(closing(file))
        now = tuple(file.metadata.row_group(group).num_rows for group in range(file.num_row_groups))
        if now != counts:
            raise _changed(listing, shard.file, _rows(now), _rows(counts))
        groups, row, rows = _row_range(shard, counts)
        target = pa.schema(fields)
        encoded = _categories(file, fields) if as_categories and groups else []
        if encoded:
            with reading(path):
                file = _open_parquet(filesystem, path, local, encoded)
            stack.enter_context(closing(file))
            for name in encoded:
                kind = pa.dictionary(pa.int32(), pa.string())
                place = target.get_field_index(name)
                target = target.set(place, target.field(place).with_type(kind))
        batches = None
        if groups:
            batches = file.iter_batches(
                batch_rows, groups, [field.name for field in fields], use_threads=use_threads
            )
        while batches is not None and row < rows.stop:
            with reading(path):
                batch = next(batches, None)
                if batch is None:
                    return
                first, row = row, row + batch.num_rows
                if row <= rows.start:
                    continue
                skip = max(rows.start - first, 0)
                first += skip
                batch = batch.slice(skip, min(row, rows.stop) - first)
                table = pa.Table.from_batches([batch]).select(target.names)
                if not table.schema.equals(target):
                    table = table.cast(target)
            positions = np.arange(first, first + batch.num_rows, dtype=np.int64)
            yield RowBatch(table, positions, [])


def _row_range(shard: Shard, counts: Sequence[int]) -> tuple[list[int], int, range]:
    """What to read of a Parquet file.

    Returns:
        The row groups that have any of the shard's rows; the row of the file that they begin
        with; and the rows of the shard. Parquet cannot seek to a row: those between are dropped.
    """
    edges = np.cumsum([0, *counts]).tolist()
    if shard.unit == "rows":
        rows = range(shard.start, shard.stop)
    else:
        rows = range(edges[shard.start], edges[shard.stop])
    groups = [
        group
        for group, count in enumerate(counts)
        if count and edges[group] < rows.stop and edges[group + 1] > rows.start
    ]
    return groups, edges[groups[0]] if groups else rows.start, rows


def _rows(counts: Sequence[int]) -> str:
    return f"{sum(counts):,} rows in {len(counts)} row groups"


def _read_text(listing: Listing, shard: Shard, fields: Sequence[pa.Field]) -> Iterator[RowBatch]:
    path, facts = listing.path(shard.file), listing.files[shard.file]
    filesystem = listing.open()
    with reading(path):
        begin, parser = _parser(listing, path, fields)
        file = open_text(filesystem, path)
    with closing(file):
        if facts.splittable and file.size() != facts.size_bytes:
            was = f"{facts.size_bytes:,} bytes"
            raise _changed(listing, shard.file, f"{file.size():,} bytes", was)
        lines = _lines(listing, shard, file, begin, facts.splittable)
        while True:
            with reading(path):
                part = next(lines, None)
                if part is None:
                    return
                batch = parser.parse(part)
            yield batch


def _parser(
    listing: Listing, path: str, fields: Sequence[pa.Field]
) -> tuple[int, CsvParser | JsonParser]:
    """Where the first line of the file begins, and what makes rows of lines."""
    filesystem = listing.open()
    if listing.format == "jsonl":
        begin = len(BOM) if read_head(filesystem, path, len(BOM)) == BOM else 0
        return begin, JsonParser(fields)
    try:
        names, begin = read_header(filesystem, path, listing.delimiter, listing.newlines_in_values)
        columns = {item.name: names.index(item.name) for item in fields} if names else {}
    except ValueError as error:
        raise SetupError(f"{path} is not the file that was listed: {error}") from error
    return begin, CsvParser(len(names), columns, listing.delimiter)


def _lines(
    listing: Listing, shard: Shard, file: Any, begin: int, splittable: bool
) -> Iterator[Lines]:
    if not splittable:
        # It is one shard, whatever its size says: that of a compressed file is another one.
        file.read(begin)
        if listing.newlines_in_values and listing.format == "csv":
            return cut_records(file.read, begin, listing.delimiter)
        return cut_lines(file.read, begin, sys.maxsize)
    if shard.start > begin:
        begin = find_line(file, shard.start, shard.stop)
    file.seek(min(begin, file.size()))
    return cut_lines(file.read, begin, shard.stop)


def _rebatch(parts: Iterator[RowBatch], batch_rows: int) -> Generator[RowBatch, None, None]:
    """Batches of one size, of parts of any size."""
    waiting: list[RowBatch] = []
    rows = 0
    for part in parts:
        waiting.append(part)
        rows += len(part.positions)
        if rows < batch_rows:
            continue
        whole = _join(waiting)
        full = rows - rows % batch_rows
        for start in range(0, full, batch_rows):
            bad = whole.bad if start == 0 else []
            stop = start + batch_rows
            table = whole.table.slice(start, batch_rows)
            yield RowBatch(table, whole.positions[start:stop], bad)
        waiting, rows = [RowBatch(whole.table.slice(full), whole.positions[full:], [])], rows - full
    if rows or any(part.bad for part in waiting):
        yield _join(waiting)


def _join(parts: Sequence[RowBatch]) -> RowBatch:
    if len(parts) == 1:
        return parts[0]
    table = pa.concat_tables([part.table for part in parts]).combine_chunks()
    positions = np.concatenate([part.positions for part in parts])
    return RowBatch(table, positions, [row for part in parts for row in part.bad])
