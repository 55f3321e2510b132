"""The yardsticks of batch jobs: pyarrow and ONNX Runtime in a loop, with nothing around them.

As many processes as cores; each has an equal part of the input's row groups, a session with one
thread, and writes one Parquet file with the columns that a job of rayprism writes. Nothing is
checked, counted, synced or resumed. Runs as a process of its own:
`python -m bench.batch.plain flights ...`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

__all__ = ["RowGroup", "cut_batches", "main", "share_out"]

_GROUP_ROWS = 131_072
_COMPRESSION = "zstd"
_NUMBERS = ("month", "hour", "minute", "distance")
_TEXTS = ("carrier", "origin", "dest")
_MAX_TOKENS = 256
_WINDOW_ROWS = 16_384
"""Rows that are sorted by length together, as many as a job of rayprism holds at most."""

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class RowGroup:
    """A row group of a Parquet file."""

    file: str
    number: int
    rows: int


@dataclass(frozen=True)
class _Task:
    """What one process does."""

    given: argparse.Namespace
    groups: list[RowGroup]
    target: Path


def share_out(groups: Sequence[RowGroup], parts: int) -> list[list[RowGroup]]:
    """Cuts row groups into parts of about the same rows, each of neighbours."""
    total = sum(group.rows for group in groups)
    shares: list[list[RowGroup]] = [[] for _ in range(parts)]
    before = 0
    for group in groups:
        middle = before + group.rows / 2
        shares[min(int(middle * parts / total), parts - 1)].append(group)
        before += group.rows
    return shares


def cut_batches(
    lengths: Integers, rows: int, tokens: int, *, by_length: bool
) -> Iterator[Integers]:
    """Which rows share a batch.

    Args:
        lengths: Of each row. Shape: `[rows]`.
        rows: Most rows of a batch.
        tokens: Most tokens of a batch, padding included, unless one row has more; 0: no bound.
        by_length: Whether rows of like lengths share batches.

    Yields:
        Indices of rows; each row once.
    """
    order = np.argsort(-lengths, kind="stable") if by_length else np.arange(len(lengths))
    start = 0
    while start < len(order):
        chosen = order[start : start + rows]
        if tokens:
            longest = np.maximum.accumulate(lengths[chosen])
            fitting = int((longest * np.arange(1, len(chosen) + 1) <= tokens).sum())
            chosen = chosen[: max(1, fitting)]
        yield chosen
        start += len(chosen)


def main() -> None:
    """Predicts everything that is in a folder."""
    given = _parse()
    groups = [
        RowGroup(str(file), number, metadata.row_group(number).num_rows)
        for file in sorted(given.input.glob("*.parquet"))
        for metadata in [pq.read_metadata(file)]
        for number in range(metadata.num_row_groups)
    ]
    given.output.mkdir(parents=True)
    tasks = [
        _Task(given, part, given.output / f"part-{index}.parquet")
        for index, part in enumerate(share_out(groups, given.cores))
        if part
    ]
    work = _flights if given.what == "flights" else _minilm
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(given.cores, mp_context=spawn) as pool:
        list(pool.map(work, tasks))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("flights", "minilm"))
    parser.add_argument("--model", type=Path, required=True, help="folder of the version")
    parser.add_argument("--digest", required=True, help="is written beside each prediction")
    parser.add_argument("--version", required=True, help="likewise")
    parser.add_argument("--input", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--cores", type=int, required=True)
    parser.add_argument("--passthrough", required=True, help="columns that are copied: a,b")
    parser.add_argument("--batch-rows", type=int, required=True)
    parser.add_argument("--batch-tokens", type=int, default=0)
    parser.add_argument("--by-length", action="store_true")
    given = parser.parse_args()
    given.passthrough = given.passthrough.split(",")
    return given


class _Writer:
    """Collects tables to row groups of a size that is quick to read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._parquet: pq.ParquetWriter | None = None
        self._waiting: list[pa.Table] = []
        self._rows = 0

    def write(self, table: pa.Table) -> None:
        self._waiting.append(table)
        self._rows += table.num_rows
        if self._rows >= _GROUP_ROWS:
            self._flush()

    def close(self) -> None:
        self._flush()
        if self._parquet is not None:
            self._parquet.close()

    def _flush(self) -> None:
        if not self._waiting:
            return
        table = pa.concat_tables(self._waiting)
        if self._parquet is None:
            self._parquet = pq.ParquetWriter(self._path, table.schema, compression=_COMPRESSION)
        self._parquet.write_table(table, row_group_size=table.num_rows)
        self._waiting, self._rows = [], 0


def _flights(task: _Task) -> None:
    session, output = _session(task.given.model)
    writer = _Writer(task.target)
    columns = list(dict.fromkeys((*task.given.passthrough, *_NUMBERS, *_TEXTS)))
    for batch in _read(task, columns, task.given.batch_rows, texts=_TEXTS):
        feed = {name: batch.column(name).to_numpy() for name in _NUMBERS}
        for name in _TEXTS:
            # One object for each of the few different texts, and not for each row.
            column = batch.column(name)
            distinct = column.dictionary.to_numpy(zero_copy_only=False)
            feed[name] = distinct[column.indices.to_numpy()]
        (probability,) = session.run([output], feed)
        writer.write(_table(task.given, batch, {output: pa.array(probability)}))
    writer.close()


def _minilm(task: _Task) -> None:
    # Each process has one core: a pool of threads for each would only get in the way.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from tokenizers import Tokenizer

    given = task.given
    session, _ = _session(given.model)
    tokenizer = Tokenizer.from_file(str(given.model / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(_MAX_TOKENS)
    writer = _Writer(task.target)
    columns = list(dict.fromkeys((*given.passthrough, "text")))
    for window in _windows(_read(task, columns, _WINDOW_ROWS)):
        encodings = tokenizer.encode_batch_fast(window.column("text").to_pylist())
        tokens = [encoding.ids for encoding in encodings]
        embeddings = _embed(session, tokens, given)
        flat = pa.array(embeddings.ravel())
        column = pa.FixedSizeListArray.from_arrays(flat, embeddings.shape[1])
        writer.write(_table(given, window, {"embedding": column}))
    writer.close()


def _embed(
    session: Any, tokens: Sequence[Sequence[int]], given: argparse.Namespace
) -> NDArray[np.float32]:
    """Mean-pooled, of length 1, in the order of the rows. Shape: `[rows, 384] float32`."""
    lengths = np.array([len(row) for row in tokens], np.int64)
    names = [item.name for item in session.get_inputs()]
    embeddings: NDArray[np.float32] | None = None
    for rows in cut_batches(
        lengths, given.batch_rows, given.batch_tokens, by_length=given.by_length
    ):
        ids = np.zeros((len(rows), lengths[rows].max()), np.int64)
        for place, row in enumerate(rows):
            ids[place, : lengths[row]] = tokens[row]
        mask = (np.arange(ids.shape[1]) < lengths[rows, np.newaxis]).astype(np.int64)
        feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        (hidden,) = session.run(None, {name: feed[name] for name in names})[:1]
        pooled = np.matmul(mask[:, np.newaxis, :].astype(np.float32), hidden)[:, 0, :]
        if embeddings is None:
            embeddings = np.empty((len(tokens), pooled.shape[1]), np.float32)
        embeddings[rows] = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
    assert embeddings is not None
    return embeddings


def _session(folder: Path) -> tuple[Any, str]:
    """A session with one thread, and the name of its first output."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )
    return session, session.get_outputs()[0].name


def _read(
    task: _Task, columns: Sequence[str], rows: int, texts: Sequence[str] = ()
) -> Iterator[pa.RecordBatch]:
    """Batches of the task's row groups; columns of `texts` are dictionaries."""
    for path in dict.fromkeys(group.file for group in task.groups):
        numbers = [group.number for group in task.groups if group.file == path]
        with pq.ParquetFile(path, read_dictionary=list(texts) or None) as file:
            yield from file.iter_batches(rows, numbers, list(columns), use_threads=False)


def _windows(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.Table]:
    """Row groups may be smaller than what can be sorted together."""
    waiting: list[pa.RecordBatch] = []
    for batch in batches:
        waiting.append(batch)
        if sum(item.num_rows for item in waiting) >= _WINDOW_ROWS:
            yield pa.Table.from_batches(waiting)
            waiting = []
    if waiting:
        yield pa.Table.from_batches(waiting)


def _table(
    given: argparse.Namespace, rows: pa.RecordBatch | pa.Table, predictions: dict[str, Any]
) -> pa.Table:
    """The columns that a job of rayprism writes, with its types."""
    columns: dict[str, Any] = {}
    for name in given.passthrough:
        column = rows.column(name)
        is_encoded = pa.types.is_dictionary(column.type)
        columns[name] = column.dictionary_decode() if is_encoded else column
    columns |= predictions
    told = (("model", given.what), ("model_version", given.version), ("model_digest", given.digest))
    indices = pa.array(np.zeros(rows.num_rows, np.int32))
    for name, value in told:
        columns[name] = pa.DictionaryArray.from_arrays(indices, pa.array([value]))
    return pa.table(columns)


if __name__ == "__main__":
    main()
