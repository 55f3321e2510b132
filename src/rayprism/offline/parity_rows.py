"""The rows that a job's output is checked on: drawn by lot, read again, found in the output."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rayprism.core.shards import Shard
from rayprism.core.tensors import Array, Datatype, Tensors, TensorSpec, numpy_dtype
from rayprism.errors import SetupError
from rayprism.models.manifest import Manifest
from rayprism.offline.commits import DEAD_LETTERS_FOLDER, JOB_FILE, Commit, OutputFolder
from rayprism.offline.filesystems import open_filesystem, reading
from rayprism.offline.lines import BadRow, Integers
from rayprism.offline.outputs import inner_shape
from rayprism.offline.parts import FILE_COLUMN, ROW_COLUMN
from rayprism.offline.readers import read_shard
from rayprism.offline.rows import RaggedRows, RowFault
from rayprism.offline.sinks import Store

if TYPE_CHECKING:
    from rayprism.offline.files import Listing
    from rayprism.offline.plan import Plan

__all__ = ["JobOutput", "SampledRow", "draw_rows", "read_rows"]

MOST_SHARDS = 32
"""So many are read again at most: each is read from its start up to the last row that was drawn."""
_READ_ROWS = 16_384


def draw_rows(
    rows: Mapping[int, int], sample: int, seed: int, *, most_shards: int = MOST_SHARDS
) -> dict[int, Integers]:
    """Draws rows, each as likely as any other.

    Of many shards some are drawn first, each as often as it has rows for it, and then as many rows
    of each: what has to be read does not grow with the data.

    Args:
        rows: Of each shard, by its number.
        sample: How many to draw; all of them where there are no more.
        seed: The same seed draws the same rows.
        most_shards: Out of how many shards at most.

    Returns:
        By shard, ascending: places in it, ascending, counted from 0.

    Source: systematic sampling with probability proportional to size (Madow, 1949).
    """
    shards = np.array(sorted(number for number, count in rows.items() if count), np.int64)
    counts = np.array([rows[int(number)] for number in shards], np.int64)
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    if sample >= total:
        return {int(number): np.arange(rows[int(number)]) for number in shards}
    random = np.random.default_rng(seed)
    if len(shards) <= most_shards:
        places = np.sort(random.choice(total, sample, replace=False))
        owners = np.searchsorted(ends, places, side="right")
        return {
            int(shards[owner]): places[owners == owner] - (ends[owner] - counts[owner])
            for owner in np.unique(owners)
        }
    draws = min(most_shards, sample)
    shares = np.full(draws, sample // draws)
    shares[: sample % draws] += 1
    points = (random.random() + np.arange(draws)) * (total / draws)
    owners = np.minimum(np.searchsorted(ends, points, side="right"), len(shards) - 1)
    # Shuffled: else the first shards of the input would have the larger shares.
    wanted = np.bincount(owners, random.permutation(shares), len(shards)).astype(np.int64)
    return {
        int(shards[owner]): np.sort(
            random.choice(counts[owner], min(wanted[owner], counts[owner]), replace=False)
        )
        for owner in np.unique(owners)
    }


@dataclass(frozen=True, slots=True)
class SampledRow:
    """A row of the input, and what the job made of it.

    Args:
        shard: Its number.
        file: Of the input.
        position: Row or byte in the file, as in dead letters; 0 where the file is one row.
        inputs: What the model takes, as a request of one row; None where no such request can be
            made of the row.
        outputs: The job's answer, likewise; None where the row is a dead letter.
        letter: Why it is one.
    """

    shard: int
    file: str
    position: int
    inputs: Tensors | None
    outputs: Tensors | None = None
    letter: RowFault | None = None


class JobOutput:
    """What a job has written so far. Changes nothing.

    Args:
        uri: Of the folder.
    """

    def __init__(self, uri: str) -> None:
        filesystem, path = open_filesystem(uri)
        self.path = path
        self._store = Store(filesystem, path)
        self._folder = OutputFolder(filesystem, path)

    def commits(self, plan: Plan) -> dict[int, Commit]:
        """The entries of the shards that are done, by number.

        Raises:
            JobChanged: The output was begun by another job than this plan.
            SetupError: There is no output, or nothing in it.
        """
        if not self._store.exists(JOB_FILE):
            raise SetupError(f"{self.path} holds no job's output. Mend: run the job first")
        self._folder.check(plan.identity(), len(plan.shards))
        commits = {commit.shard: commit for commit in self._folder.commits()}
        if not commits:
            raise SetupError(f"no shard in {self.path} is done yet. Mend: run the job first")
        return commits

    def letters(self, commit: Commit) -> list[dict[str, Any]]:
        """The dead letters of a shard."""
        if not commit.dead_letters:
            return []
        name = f"{DEAD_LETTERS_FOLDER}/part-{commit.shard:08d}.jsonl"
        data = self._store.read(name)
        if data is None:
            raise SetupError(f"{self._store.at(name)} is gone. Mend: run the job again")
        return [json.loads(line) for line in data.splitlines()]

    def rows(self, commit: Commit, places: Integers, columns: Sequence[str]) -> pa.Table:
        """Some rows of a shard's file.

        Args:
            commit: Of the shard.
            places: Ascending.
            columns: Which are wanted.

        Raises:
            SetupError: The file is gone, or is not the one that was committed.
        """
        path = self._store.at(commit.file or "")
        with reading(path), pq.ParquetFile(path, filesystem=self._store.fs) as file:
            have = file.metadata.num_rows
            if have != commit.rows_out or (len(places) and places[-1] >= have):
                raise SetupError(
                    f"{path} has {have:,} rows, and its entry says {commit.rows_out:,}. "
                    "Mend: run the job again"
                )
            groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            ends = np.cumsum(groups)
            owners = np.searchsorted(ends, places, side="right")
            tables = [
                file.read_row_group(int(owner), columns).take(
                    pa.array(places[owners == owner] - (ends[owner] - groups[owner]))
                )
                for owner in np.unique(owners)
            ]
        return pa.concat_tables(tables)


@dataclass(frozen=True, slots=True)
class _Readable:
    """A row as it was read again.

    Args:
        place: Among the rows of its shard that could be read; of files, among all.
        position: In the file; of files, in the listing.
        table: The row.
    """

    place: int
    position: int
    table: pa.Table


def read_rows(plan: Plan, output: JobOutput, commit: Commit, places: Integers) -> list[SampledRow]:
    """Reads rows of a shard again, as the job does, and finds them in its output.

    Args:
        plan: The job.
        output: What it has written.
        commit: Of the shard.
        places: Which rows, ascending: places among those that the reader gives, the ones that it
            could not read included.

    Raises:
        SetupError: The input or the output is not what it was when the job ran.
    """
    shard = plan.shards[commit.shard]
    rows, bad, unreadable = _read_again(plan, shard, places)
    letters = {_position(letter, plan.listing): letter for letter in output.letters(commit)}
    # Rows without an output that stand before others with one.
    skipped = np.array(sorted(set(letters) - unreadable), np.int64)
    kept = [row for row in rows if row.position not in letters]
    where = [row.place - int(np.searchsorted(skipped, row.position)) for row in kept]
    outputs = _outputs(plan, output, commit, kept, np.array(where, np.int64))
    found = [
        _sampled(plan, shard, row.position, inputs, outputs.get(row.position), letters)
        for row, inputs in zip(rows, _inputs(plan, rows), strict=True)
    ]
    found += [_sampled(plan, shard, row.position, None, None, letters) for row in bad]
    return found


def _read_again(
    plan: Plan, shard: Shard, places: Integers
) -> tuple[list[_Readable], list[BadRow], set[int]]:
    """The rows, those among them that could not be read, and the positions of all such rows.

    Of the latter all are known that stand before the last of the rows: the reader tells of them no
    later than of the rows that follow them.
    """
    if shard.unit == "files":
        return *_read_files(plan, shard, places), set()
    rows: list[_Readable] = []
    bad: list[BadRow] = []
    unreadable: set[int] = set()
    seen = readable = 0
    for batch in read_shard(plan.listing, shard, plan.columns.needed, _READ_ROWS):
        count, failed = len(batch.positions), len(batch.bad)
        here = places[(places >= seen) & (places < seen + count + failed)] - seen
        for place in here[here < count].tolist():
            position = int(batch.positions[place])
            # A copy: a slice would keep the whole batch in memory.
            table = batch.table.take(pa.array([place]))
            rows.append(_Readable(readable + place, position, table))
        bad += [batch.bad[place - count] for place in here[here >= count].tolist()]
        unreadable |= {item.position for item in batch.bad}
        seen, readable = seen + count + failed, readable + count
        if len(places) and seen > places[-1]:
            break
    if len(rows) + len(bad) < len(places):
        raise _changed(plan, shard, f"it has {seen:,} rows where the job counted more")
    return rows, bad, unreadable


def _read_files(plan: Plan, shard: Shard, places: Integers) -> tuple[list[_Readable], list[BadRow]]:
    """The same where each file is a row: only the files that were drawn are opened."""
    rows: list[_Readable] = []
    bad: list[BadRow] = []
    for place in places.tolist():
        index = shard.start + place
        one = replace(shard, file=index, start=index, stop=index + 1, rows=1)
        for batch in read_shard(plan.listing, one, plan.columns.needed, 1):
            rows += [_Readable(place, index, batch.table) for _ in batch.positions]
            bad += batch.bad
    return rows, bad


def _changed(plan: Plan, shard: Shard, why: str) -> SetupError:
    return SetupError(
        f"{plan.listing.path(shard.file)} is not what the job read in shard {shard.number}: {why}. "
        "Mend: leave the input alone, or run the job again with --restart"
    )


def _position(letter: Mapping[str, Any], listing: Listing) -> int:
    """Where a dead letter's row stands: its row or byte, or of whole files its place among them."""
    for unit in ("row", "byte"):
        if unit in letter:
            return int(letter[unit])
    paths = {facts.path: index for index, facts in enumerate(listing.files)}
    return paths[letter["file"]]


def _sampled(
    plan: Plan,
    shard: Shard,
    position: int,
    inputs: Tensors | None,
    outputs: Tensors | None,
    letters: Mapping[int, Mapping[str, Any]],
) -> SampledRow:
    letter = letters.get(position)
    if letter is None and (inputs is None or outputs is None):
        raise _changed(plan, shard, f"the row at {position} had a prediction, and has a fault now")
    path, row = _place(plan, shard, position)
    return SampledRow(
        shard.number,
        path,
        row,
        inputs,
        outputs,
        None if letter is None else RowFault(letter["code"], letter["reason"]),
    )


def _place(plan: Plan, shard: Shard, position: int) -> tuple[str, int]:
    """File and row as the columns `_file` and `_row` have them."""
    files = plan.listing.files
    if shard.unit == "files":
        return files[position].path, 0
    return files[shard.file].path, position


def _inputs(plan: Plan, rows: Sequence[_Readable]) -> list[Tensors | None]:
    """The model's inputs of each row; None where a row is at fault."""
    if not rows:
        return []
    mapped = plan.columns.tensors(pa.concat_tables([row.table for row in rows]))
    index = np.cumsum(mapped.ok) - 1
    return [
        {name: _one(tensor, int(index[row])) for name, tensor in mapped.tensors.items()}
        if mapped.ok[row]
        else None
        for row in range(len(rows))
    ]


def _one(tensor: Array | RaggedRows, row: int) -> Array:
    if isinstance(tensor, RaggedRows):
        return tensor.row(row)[np.newaxis]
    return tensor[row : row + 1]


def _outputs(
    plan: Plan,
    output: JobOutput,
    commit: Commit,
    rows: Sequence[_Readable],
    places: Integers,
) -> dict[int, Tensors]:
    """What the job answered to rows, by their position."""
    if not rows:
        return {}
    manifest, prefix = plan.version.manifest, plan.columns.prefix
    copied = list(plan.columns.passthrough)
    if plan.spec.output.row_position:
        copied += [FILE_COLUMN, ROW_COLUMN]
    columns = [prefix + name for name in manifest.output_names]
    table = output.rows(commit, places, [*columns, *copied])
    _check_copies(plan, commit, rows, table.select(copied))
    arrays = {
        spec.name: _row_arrays(table.column(prefix + spec.name), spec, manifest)
        for spec in manifest.outputs
    }
    return {
        row.position: {name: values[index] for name, values in arrays.items()}
        for index, row in enumerate(rows)
    }


def _check_copies(plan: Plan, commit: Commit, rows: Sequence[_Readable], table: pa.Table) -> None:
    """Refuses an output whose rows are not those of the input, as far as they tell."""
    shard = plan.shards[commit.shard]
    mine = pa.concat_tables([row.table for row in rows])
    where = [_place(plan, shard, row.position) for row in rows]
    added: dict[str, list[Any]] = {
        FILE_COLUMN: [path for path, _ in where],
        ROW_COLUMN: [row for _, row in where],
    }
    for name in table.column_names:
        values = mine.column(name).to_pylist() if name in mine.column_names else added[name]
        for value, other in zip(values, table.column(name).to_pylist(), strict=True):
            # As text: NaN is equal to NaN, also in lists.
            if repr(value) != repr(other):
                why = f"column {name!r} has {value!r:.80}, the output has {other!r:.80}"
                raise _changed(plan, shard, why)


def _row_arrays(column: Any, spec: TensorSpec, manifest: Manifest) -> list[Array]:
    """Each row of an output's column as a tensor of one row: what `outputs.output_table` undoes."""
    inner = inner_shape(spec, manifest.batching.batched)
    dtype = numpy_dtype(spec.datatype)
    arrays = []
    for value in column.to_pylist():
        array = _array(value, dtype, spec.datatype is Datatype.BYTES)
        if array.size == 0 or inner == (1,):
            # Of a list without anything in it the inner sizes are not known.
            sizes = [*array.shape, *(max(size, 0) for size in inner[array.ndim :])]
            array = array.reshape(sizes)
        arrays.append(array[np.newaxis])
    return arrays


def _array(value: Any, dtype: np.dtype[Any], is_text: bool) -> Array:
    if not is_text:
        return np.array(value, dtype)
    text = np.array(value, np.object_)
    encoded = [item.encode() for item in text.ravel()]
    array = np.empty(len(encoded), np.object_)
    array[:] = encoded
    return array.reshape(text.shape)
