"""Rows of a shard on their way: read and mapped, predicted, made into rows of the output."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from rayprism.core.shards import Shard
from rayprism.models.manifest import Manifest
from rayprism.offline.columns import ColumnMap
from rayprism.offline.files import Listing
from rayprism.offline.images import IMAGE_COLUMN, input_columns
from rayprism.offline.lines import BadRow
from rayprism.offline.predictor import Predicted, Predictor
from rayprism.offline.readers import read_shard
from rayprism.offline.rows import Mask, RowFault, Rows, RowTensors, merge_faults
from rayprism.offline.spec import JobSpec

__all__ = ["FILE_COLUMN", "ROW_COLUMN", "Part", "ShardParts", "map_columns", "predicted"]

FILE_COLUMN, ROW_COLUMN = "_file", "_row"
"""Where a row came from: the file, and the row or byte in it."""

_READ_ROWS = 16_384
"""Rows in memory at once, but of images. More are not faster, and ragged rows sort well enough in
these."""
_UNREADABLE = "unreadable_row"


@dataclass(slots=True)
class Part:
    """Some rows of a shard, on their way from the input to the output.

    Args:
        tensors: Of the good rows.
        kept: What is copied, of all rows.
        positions: Of all rows. Shape: `[rows]`.
        ok: Which rows are good so far. Shape: `[rows]`.
        reasons: Of the other rows, by their index.
        bad: Rows that could not be read.
    """

    tensors: RowTensors
    kept: pa.Table
    positions: Rows
    ok: Mask
    reasons: dict[int, RowFault]
    bad: list[BadRow]

    def take(self, got: Predicted) -> None:
        """The good rows become what was made of them, or faults."""
        self.tensors = got.outputs
        self.ok, self.reasons = merge_faults(self.ok, self.reasons, got.ok, got.reasons)


class ShardParts:
    """Reads shards into parts, and makes rows of the output of parts.

    Args:
        spec: The job.
        listing: Its input.
        columns: Which of its columns go where.
        most_rows: Rows that the model gets at once.
        threads: That decode images.
    """

    def __init__(
        self, spec: JobSpec, listing: Listing, columns: ColumnMap, most_rows: int, threads: int = 1
    ) -> None:
        self._spec = spec
        self._listing = listing
        self._columns = columns
        self._threads = threads
        manifest = columns.manifest
        # ONNX Runtime takes `str`: text from Arrow would become bytes only to be text again.
        self._as_text = manifest.runtime == "onnx" and manifest.code is None
        self._kept = pa.schema([listing.schema.field(name) for name in columns.passthrough])
        self._read_rows = _READ_ROWS
        if listing.pixels is not None:
            # Whole batches of the model, as many as there is room for.
            room = listing.pixels.most_rows
            self._read_rows = room - room % min(room, most_rows)

    def read(self, shard: Shard) -> Iterator[Part]:
        """Reads a shard.

        Raises:
            SetupError: A file cannot be read.
        """
        batches = read_shard(
            self._listing,
            shard,
            self._columns.needed,
            self._read_rows,
            image_threads=self._threads,
            as_categories=self._as_text,
        )
        for batch in batches:
            mapped = self._columns.tensors(batch.table, as_text=self._as_text)
            kept = batch.table.select(self._columns.passthrough)
            if self._as_text:
                kept = kept.cast(self._kept)  # categories are text again
            yield Part(mapped.tensors, kept, batch.positions, mapped.ok, mapped.reasons, batch.bad)

    def folder(self, shard: Shard) -> str:
        """Where its rows go."""
        partitioned = self._spec.output.partitioned
        return self._listing.partition_folder(shard.file) if partitioned else ""

    def finish(self, shard: Shard, part: Part) -> tuple[pa.Table | None, list[dict[str, Any]]]:
        """Rows of the output, None where there are none, and dead letters."""
        faults = [(bad.position, _UNREADABLE, bad.reason) for bad in part.bad]
        faults += [
            (int(part.positions[index]), fault.code, fault.reason)
            for index, fault in part.reasons.items()
        ]
        letters = [self._letter(shard, *fault) for fault in sorted(faults)]
        ok = part.ok
        if not ok.any():
            return None, letters
        kept, positions = part.kept, part.positions
        if not ok.all():
            kept, positions = kept.filter(pa.array(ok)), positions[ok]
        if self._spec.output.row_position:
            kept = self._with_position(shard, kept, positions)
        return self._columns.output_table(part.tensors, kept), letters

    def _letter(self, shard: Shard, position: int, code: str, reason: str) -> dict[str, Any]:
        fault = {"code": code, "reason": reason}
        if shard.unit == "files":
            return {"file": self._listing.files[position].path, **fault}
        unit = "row" if self._listing.format == "parquet" else "byte"
        return {"file": self._listing.files[shard.file].path, unit: position, **fault}

    def _with_position(self, shard: Shard, table: pa.Table, positions: Any) -> pa.Table:
        index = np.zeros(len(positions), np.int32)
        paths = [self._listing.files[shard.file].path]
        if shard.unit == "files":
            # Each file is one row, its first.
            paths = [self._listing.files[position].path for position in positions]
            index, positions = np.arange(len(positions), dtype=np.int32), np.zeros_like(positions)
        files = pa.DictionaryArray.from_arrays(pa.array(index), pa.array(paths))
        table = table.append_column(FILE_COLUMN, files)
        return table.append_column(ROW_COLUMN, pa.array(positions))


def predicted(
    predictor: Predictor, parts: Iterable[Part], *, prepared: bool = False
) -> Iterator[Part]:
    """Parts whose tensors are the model's outputs.

    Args:
        predictor: Of the model.
        parts: Whose tensors are its inputs.
        prepared: Whether these went through its pre-processing already.
    """
    for part in parts:
        part.take(predictor.predict(part.tensors, int(part.ok.sum()), prepared=prepared))
        yield part


def map_columns(
    spec: JobSpec, listing: Listing, manifest: Manifest, source: str = "job"
) -> ColumnMap:
    """Which columns of a job's input go into its model, and which are copied.

    Args:
        spec: The job.
        listing: Its input.
        manifest: Of the model.
        source: What the job was read from, for messages.

    Raises:
        ConfigInvalid: Every fault, as `ColumnMap.plan` tells them.
    """
    return ColumnMap.plan(
        listing.schema,
        manifest,
        columns=input_columns(spec.input, manifest),
        passthrough=spec.output.passthrough,
        prefix=spec.output.prefix,
        added=(FILE_COLUMN, ROW_COLUMN) if spec.output.row_position else (),
        uncopied=(IMAGE_COLUMN,) if listing.format == "images" else (),
        source=source,
    )
