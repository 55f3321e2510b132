"""One attempt at a shard: its rows, its dead letters, and the entry that makes it done."""

from __future__ import annotations

import builtins
import contextlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from rayprism.offline.sinks import Sink, Store

__all__ = ["Commit", "ShardWriter", "part_name"]

_GROUP_ROWS = 131_072
_GROUP_BYTES = 32 * 1024 * 1024


def part_name(shard: int) -> str:
    """The name of the file with a shard's rows."""
    return f"part-{shard:08d}.parquet"


@dataclass(frozen=True, slots=True)
class Commit:
    """The entry of a shard that is done.

    Args:
        shard: Its number.
        rows_in: Rows of the input.
        rows_out: Rows in `file`.
        dead_letters: Rows that could not be predicted.
        file: Relative to the output; None where no row could be.
        sha256: Of the file.
        bytes: Of the file.
        seconds: That it took.
        job: Id of the job that it belongs to; see `_job.json`.
    """

    shard: int
    rows_in: int
    rows_out: int
    dead_letters: int
    file: str | None
    sha256: str | None
    bytes: int
    seconds: float
    job: str

    @classmethod
    def from_json(cls, data: builtins.bytes | None, shard: int, job: str) -> Commit | None:
        """Reads an entry; None where there is none, where it is damaged, or another job's."""
        try:
            commit = cls(**json.loads(data or b""))
        except (ValueError, TypeError):
            return None
        return commit if (commit.shard, commit.job) == (shard, job) else None


class ShardWriter:
    """One attempt at a shard. Nothing is seen of it before `commit`.

    As a context manager it takes back what was not committed.

    Args:
        store: The output.
        shard: Its number.
        job: Id of the job.
        file: Name for its rows.
        letters: Name for its dead letters.
        entry: Name for its entry.
        compression: Of the Parquet file.
        check: Raises SetupError where the output is no longer this job's.
    """

    def __init__(
        self,
        store: Store,
        shard: int,
        *,
        job: str,
        file: str,
        letters: str,
        entry: str,
        compression: str,
        check: Callable[[], None],
    ) -> None:
        self._store = store
        self._shard = shard
        self._job = job
        self._file = file
        self._letters = letters
        self._entry = entry
        self._compression = compression
        self._check = check
        self._rows_sink: Sink | None = None
        self._letters_sink: Sink | None = None
        self._parquet: pq.ParquetWriter | None = None
        self._waiting: list[pa.Table] = []
        self._waiting_rows = 0
        self._waiting_bytes = 0
        self._rows_out = 0
        self._dead_letters = 0

    def write(self, table: pa.Table | None, dead_letters: Iterable[Mapping[str, Any]] = ()) -> None:
        """Adds rows, and rows that could not be predicted.

        Args:
            table: All of a shard have one schema. None: no rows.
            dead_letters: Each says `file`, `row` or `byte`, `reason` and `code`.

        Raises:
            OutputFull: No space; nothing of the attempt is left.
            SetupError: It cannot be written.
            ValueError: The schema is another one than before.
        """
        try:
            if table is not None and table.num_rows:
                self._add(table)
            for letter in dead_letters:
                if self._letters_sink is None:
                    self._letters_sink = self._store.open(self._letters)
                line = json.dumps(letter, ensure_ascii=False, separators=(",", ":"))
                # A lone surrogate, as in a file name that is not UTF-8, has no UTF-8.
                self._letters_sink.write(line.encode("utf-8", "backslashreplace") + b"\n")
                self._dead_letters += 1
        except BaseException:
            self.abort()
            raise

    def commit(self, rows_in: int, seconds: float) -> Commit:
        """Makes the shard done, in this order: rows, dead letters, entry.

        Args:
            rows_in: Rows of the input: as many as were written and as are dead letters.
            seconds: That it took.

        Returns:
            What is committed: another attempt's, where that was first.

        Raises:
            ValueError: Rows got lost, or came twice.
            OutputFull: No space; nothing of the attempt is left.
            SetupError: It cannot be written, or the output was begun anew meanwhile.
        """
        try:
            return self._commit(rows_in, seconds)
        finally:
            self.abort()

    def abort(self) -> None:
        """Leaves nothing of the attempt behind; what is committed stays."""
        for sink in (self._rows_sink, self._letters_sink):
            if sink is not None:
                sink.discard()
        self._waiting.clear()
        if self._parquet is not None:
            # It writes its footer, to a sink that takes no more.
            with contextlib.suppress(OSError, pa.ArrowException):
                self._parquet.close()
            self._parquet = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.abort()

    def _commit(self, rows_in: int, seconds: float) -> Commit:
        if rows_in != self._rows_out + self._dead_letters:
            raise ValueError(
                f"shard {self._shard}: {rows_in} rows came in, {self._rows_out} went out and "
                f"{self._dead_letters} are dead letters"
            )
        self._write_group()
        if self._parquet is not None:
            self._parquet.close()
            self._parquet = None
        commit = Commit(
            shard=self._shard,
            rows_in=rows_in,
            rows_out=self._rows_out,
            dead_letters=self._dead_letters,
            file=self._file if self._rows_sink else None,
            sha256=self._rows_sink.sha256 if self._rows_sink else None,
            bytes=self._rows_sink.size if self._rows_sink else 0,
            seconds=round(seconds, 3),
            job=self._job,
        )
        self._check()
        first = Commit.from_json(self._store.read(self._entry), self._shard, self._job)
        if first is not None:
            return first
        for sink, name in ((self._rows_sink, self._file), (self._letters_sink, self._letters)):
            if sink is not None:
                sink.publish()
            elif self._store.exists(name):
                # Of an attempt that died, on a model that does not always say the same.
                self._store.delete(name)
        self._store.write(self._entry, json.dumps(asdict(commit)).encode() + b"\n")
        return commit

    def _add(self, table: pa.Table) -> None:
        if self._rows_sink is None:
            self._rows_sink = self._store.open(self._file)
            compression = None if self._compression == "none" else self._compression
            self._parquet = pq.ParquetWriter(
                pa.PythonFile(self._rows_sink, mode="w"), table.schema, compression=compression
            )
        if self._parquet is None or table.schema != self._parquet.schema:
            raise ValueError(f"shard {self._shard}: another schema than before: {table.schema}")
        self._rows_out += table.num_rows
        self._waiting.append(table)
        self._waiting_rows += table.num_rows
        self._waiting_bytes += table.nbytes
        # A row group for each batch would make files that are slow to read.
        if self._waiting_rows >= _GROUP_ROWS or self._waiting_bytes >= _GROUP_BYTES:
            self._write_group()

    def _write_group(self) -> None:
        if self._waiting and self._parquet is not None:
            table = pa.concat_tables(self._waiting)
            self._parquet.write_table(table, row_group_size=table.num_rows)
        self._waiting.clear()
        self._waiting_rows = self._waiting_bytes = 0
