"""Does one shard after the other: read, map, predict, write, commit.

Knows no Ray: actors, a run on a laptop and tests all use it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import pyarrow as pa

from rayprism.core.shards import Shard
from rayprism.errors import RayprismError
from rayprism.models.loader import LoadedModel, load_model
from rayprism.models.repository import Repository
from rayprism.offline.columns import ColumnMap
from rayprism.offline.commits import OutputFolder
from rayprism.offline.files import Listing
from rayprism.offline.lines import RowBatch
from rayprism.offline.predictor import Predictor
from rayprism.offline.readers import read_shard
from rayprism.offline.rows import merge_faults
from rayprism.offline.spec import JobSpec

__all__ = ["FILE_COLUMN", "ROW_COLUMN", "Outcome", "ShardWorker"]

FILE_COLUMN, ROW_COLUMN = "_file", "_row"
"""Where a row came from: the file, and the row or byte in it."""

_READ_ROWS = 16_384
"""Rows in memory at once. Larger ones are not faster, and ragged rows sort well enough in these."""
_UNREADABLE = "unreadable_row"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a shard.

    Args:
        shard: Its number.
        rows_in: Rows of the input; 0 where it failed.
        dead_letters: Rows that could not be predicted.
        seconds: That it took.
        rss_bytes: Memory of the process afterwards.
        error: Why it is not done; None where it is.
    """

    shard: int
    rows_in: int = 0
    dead_letters: int = 0
    seconds: float = 0.0
    rss_bytes: int = 0
    error: str | None = None


class ShardWorker:
    """Predicts shards, with a model that is loaded when the first one comes.

    Args:
        spec: The job.
        listing: Its input.
        output: Where it writes, begun by the driver.
        threads: Of one run of the model.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        spec: JobSpec,
        listing: Listing,
        output: OutputFolder,
        *,
        threads: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._spec = spec
        self._listing = listing
        self._output = output
        self._threads = threads
        self._clock = clock
        self._loaded: tuple[ColumnMap, Predictor, LoadedModel] | None = None
        self._process = psutil.Process()

    def run(self, shard: Shard) -> Outcome:
        """Does a shard, or says why it could not be done: one shard's failure is its own."""
        began_s = self._clock()
        try:
            columns, predictor = self._load()
            folder = self._listing.partition_folder(shard.file)
            rows_in = dead_letters = 0
            with self._output.writer(
                shard.number, folder if self._spec.output.partitioned else ""
            ) as writer:
                for batch in self._read(shard, columns):
                    table, letters = self._predict(shard, batch, columns, predictor)
                    writer.write(table, letters)
                    rows_in += len(batch.positions) + len(batch.bad)
                    dead_letters += len(letters)
                writer.commit(rows_in, self._clock() - began_s)
        except (RayprismError, OSError, pa.ArrowException, MemoryError) as error:
            return self._outcome(shard, began_s, error=f"{type(error).__name__}: {error}")
        return self._outcome(shard, began_s, rows_in, dead_letters)

    def close(self) -> None:
        """Lets go of the model."""
        if self._loaded is not None:
            self._loaded[2].close()
            self._loaded = None

    def _load(self) -> tuple[ColumnMap, Predictor]:
        if self._loaded is None:
            spec = self._spec
            version = Repository(spec.repository_path()).version(spec.model, spec.version)
            columns = ColumnMap.plan(
                self._listing.schema,
                version.manifest,
                columns=spec.input.columns,
                passthrough=spec.output.passthrough,
                prefix=spec.output.prefix,
                added=(FILE_COLUMN, ROW_COLUMN) if spec.output.row_position else (),
            )
            model = load_model(
                version,
                allow_code=spec.allow_code,
                threads=self._threads,
                device=spec.device,
            )
            self._loaded = (columns, Predictor(model, spec.limits.batch_rows), model)
        return self._loaded[0], self._loaded[1]

    def _read(self, shard: Shard, columns: ColumnMap) -> Iterator[RowBatch]:
        return read_shard(self._listing, shard, columns.needed, _READ_ROWS)

    def _predict(
        self, shard: Shard, batch: RowBatch, columns: ColumnMap, predictor: Predictor
    ) -> tuple[pa.Table | None, list[dict[str, Any]]]:
        mapped = columns.tensors(batch.table)
        got = predictor.predict(mapped.tensors, int(mapped.ok.sum()))
        ok, reasons = merge_faults(mapped.ok, mapped.reasons, got.ok, got.reasons)
        letters = [self._letter(shard, bad.position, _UNREADABLE, bad.reason) for bad in batch.bad]
        letters += [
            self._letter(shard, int(batch.positions[index]), fault.code, fault.reason)
            for index, fault in reasons.items()
        ]
        letters.sort(key=lambda letter: letter[self._unit])
        if not ok.any():
            return None, letters
        kept = batch.table.select(columns.passthrough)
        positions = batch.positions
        if not ok.all():
            kept, positions = kept.filter(pa.array(ok)), positions[ok]
        if self._spec.output.row_position:
            kept = self._with_position(shard, kept, positions)
        return columns.output_table(got.outputs, kept), letters

    @property
    def _unit(self) -> str:
        return "row" if self._listing.format == "parquet" else "byte"

    def _letter(self, shard: Shard, position: int, code: str, reason: str) -> dict[str, Any]:
        path = self._listing.files[shard.file].path
        return {"file": path, self._unit: position, "code": code, "reason": reason}

    def _with_position(self, shard: Shard, table: pa.Table, positions: Any) -> pa.Table:
        path = pa.array([self._listing.files[shard.file].path])
        index = pa.array(np.zeros(len(positions), np.int32))
        table = table.append_column(FILE_COLUMN, pa.DictionaryArray.from_arrays(index, path))
        return table.append_column(ROW_COLUMN, pa.array(positions))

    def _outcome(
        self,
        shard: Shard,
        began_s: float,
        rows_in: int = 0,
        dead_letters: int = 0,
        error: str | None = None,
    ) -> Outcome:
        return Outcome(
            shard.number,
            rows_in,
            dead_letters,
            self._clock() - began_s,
            self._process.memory_info().rss,
            error,
        )
