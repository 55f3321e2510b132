"""Reads the images of a shard, a batch at a time: each file is a row."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Semaphore

import numpy as np
import pyarrow as pa
from pyarrow import fs as pa_fs

from rayprism.core.shards import Shard
from rayprism.core.tensors import Array
from rayprism.errors import SetupError
from rayprism.offline.files import Listing
from rayprism.offline.filesystems import what_failed
from rayprism.offline.images import (
    IMAGE_COLUMN,
    PixelFormat,
    UnreadableImage,
    decode_image,
    load_pillow,
)
from rayprism.offline.lines import BadRow, RowBatch
from rayprism.offline.partitions import partition_values

__all__ = ["read_images"]

# Source: Pillow's default limit of pixels, uncompressed with three bytes each.
_MOST_FILE_BYTES = 1 << 28
# Over a network most of the time is spent on waiting.
_REMOTE_READS = 8
_MOST_PROBES = 8


def read_images(
    listing: Listing, shard: Shard, columns: Sequence[str], batch_rows: int, threads: int = 1
) -> Generator[RowBatch, None, None]:
    """Reads the files of a shard, in order.

    A file that is gone, cannot be read, is not as long as it was, or is no whole image is a bad
    row. Where the pixels are not among the columns, no file is opened.

    Args:
        listing: Of images.
        shard: Of files.
        columns: Of the listing's schema.
        batch_rows: Most files of a batch; at most 64 MiB of pixels are in one.
        threads: That decode. More files are open at once where the filesystem is not local.

    Yields:
        Batches. Positions are indices of files in the listing.

    Raises:
        SetupError: Pillow is not installed; or a file cannot be read, and no other either.
    """
    assert listing.pixels is not None, "a listing of images has the format of their pixels"
    load_pillow()
    files = _Files(listing, listing.pixels, threads)
    rows = min(batch_rows, listing.pixels.most_rows)
    local = isinstance(listing.open(), pa_fs.LocalFileSystem)
    with ThreadPoolExecutor(threads if local else max(threads, _REMOTE_READS)) as pool:
        for start in range(shard.start, shard.stop, rows):
            indices = range(start, min(start + rows, shard.stop))
            if IMAGE_COLUMN not in columns or IMAGE_COLUMN in listing.partitions:
                yield _batch(listing, columns, indices, None, [])
            else:
                pixels, faults = files.read(indices, pool)
                yield _batch(listing, columns, indices, pixels, faults)


class _Files:
    """Reads and decodes the files of a listing."""

    def __init__(self, listing: Listing, pixels: PixelFormat, threads: int) -> None:
        self._listing = listing
        self._filesystem = listing.open()
        self._pixels = pixels
        self._decoding = Semaphore(threads)
        self._last_read: int | None = None

    def read(self, indices: range, pool: ThreadPoolExecutor) -> tuple[Array, list[tuple[int, str]]]:
        """Reads files.

        Returns:
            Pixels, one row for each file; and the places of rows at fault, whose pixels are any,
            with the reasons.
        """
        out = self._pixels.empty(len(indices))
        faults = []
        for place, fault in enumerate(pool.map(self._decode, indices, out)):
            if isinstance(fault, Exception):
                fault = self._whose_fault(indices[place], out[place], fault)
            if fault is not None:
                faults.append((place, fault))
        return out, faults

    def _decode(self, index: int, out: Array) -> str | Exception | None:
        """What is wrong with a file: a reason, or an error that may be the filesystem's."""
        size_bytes = self._listing.files[index].size_bytes
        if size_bytes > _MOST_FILE_BYTES:
            return f"the file has {size_bytes:,} bytes, allowed are {_MOST_FILE_BYTES:,}"
        try:
            with self._open(index) as file:
                data = file.read()
        except MemoryError:
            raise
        except (OSError, pa.ArrowException) as error:
            return error
        self._last_read = index
        if len(data) != size_bytes:
            return f"the file has {len(data):,} bytes, it had {size_bytes:,} when it was listed"
        with self._decoding:
            try:
                decode_image(data, self._pixels, out)
            except UnreadableImage as error:
                return str(error)
        return None

    def _open(self, index: int) -> pa.NativeFile:
        return self._filesystem.open_input_stream(self._listing.path(index), compression=None)

    def _whose_fault(self, index: int, out: Array, error: Exception) -> str | None:
        """Tells a file that cannot be read from a filesystem that cannot be.

        Returns:
            Why the file is a bad row; None where it could be read after all.

        Raises:
            SetupError: It is the filesystem: no row may be given up for that.
        """
        if not isinstance(error, FileNotFoundError):
            again = self._decode(index, out)
            if not isinstance(again, Exception):
                return again
            error = again
        if not self._can_read_others(index):
            raise SetupError(
                f"{self._listing.path(index)} cannot be read, and neither can other files of the "
                f"input: {what_failed(error)}"
            ) from error
        if isinstance(error, FileNotFoundError):
            return "the file is not there any more"
        return f"the file cannot be read: {what_failed(error)}"

    def _can_read_others(self, index: int) -> bool:
        count = len(self._listing.files)
        spread = range(0, count, -(-count // _MOST_PROBES))
        last = [] if self._last_read is None else [self._last_read]
        for other in (*last, *spread):
            try:
                if other != index:
                    with self._open(other) as file:
                        file.read(1)
                    return True
            except (OSError, pa.ArrowException):
                continue
        return False


def _batch(
    listing: Listing,
    columns: Sequence[str],
    indices: range,
    pixels: Array | None,
    faults: list[tuple[int, str]],
) -> RowBatch:
    ok = np.ones(len(indices), np.bool_)
    ok[[place for place, _ in faults]] = False
    positions = np.arange(indices.start, indices.stop, dtype=np.int64)[ok]
    paths = [listing.files[index].path for index in positions]
    arrays = {}
    for name in columns:
        kind = listing.schema.field(name).type
        if name in listing.partitions:
            values = [partition_values(path)[name] for path in paths]
            arrays[name] = pa.array(values, pa.string()).cast(kind)
        elif name == IMAGE_COLUMN:
            assert pixels is not None
            assert listing.pixels is not None
            arrays[name] = listing.pixels.column(pixels[ok] if faults else pixels)
        else:
            arrays[name] = pa.array(paths, kind)
    bad = [BadRow(indices[place], reason) for place, reason in faults]
    return RowBatch(pa.table(arrays), positions, bad)
