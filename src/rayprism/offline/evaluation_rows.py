"""Reads what several versions predicted for the same rows, beside the labels.

Shard by shard: all versions read the same shards, and a row is known by its position. What is
kept of a row is a few numbers (`bytes_per_row`); a row with many scores is judged as it is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rayprism.core.tensors import Array
from rayprism.errors import SetupError
from rayprism.offline.commits import Commit, OutputFolder
from rayprism.offline.evaluation_output import Prediction, fault_at, refuse_too_many
from rayprism.offline.evaluation_spec import PREFIX, EvaluationSpec
from rayprism.offline.filesystems import open_filesystem, reading
from rayprism.offline.labels import ClassTable, SegmentTable, read_numbers
from rayprism.offline.parts import ROW_COLUMN
from rayprism.offline.quality_tasks import BinaryRows, MulticlassRows, RegressionRows, log_losses
from rayprism.offline.rows import Mask

__all__ = ["Counts", "Evaluated", "read_rows"]

_SUM_TOLERANCE = 1e-3
"""Probabilities of one row may miss 1 by so much: float32, and models that were made smaller."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Which rows are compared, and which are not.

    Args:
        rows_in: Of the input.
        not_predicted: That a version has no prediction for; not compared for any.
        dead_letters: The same of each version.
        label_missing: With predictions and no label: null, or NaN.
        not_finite: With a label, where a version gave NaN or infinity.
        not_finite_of: The same of each version.
        compared: The rest.
    """

    rows_in: int
    not_predicted: int
    dead_letters: tuple[int, ...]
    label_missing: int
    not_finite: int
    not_finite_of: tuple[int, ...]
    compared: int


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The rows that are compared.

    Args:
        scored: Labels and predictions.
        segments: The value of each row as a number, for each column. Shape: `[columns, rows]`.
        segment_values: What the numbers mean, for each column.
        classes: What the numbers of classes mean; empty for regression.
        counts: Of rows.
    """

    scored: BinaryRows | MulticlassRows | RegressionRows
    segments: Array
    segment_values: tuple[tuple[str | None, ...], ...]
    classes: tuple[str, ...]
    counts: Counts


def read_rows(spec: EvaluationSpec, prediction: Prediction, uris: Sequence[str]) -> Evaluated:
    """Reads the outputs of all versions together.

    Args:
        spec: The evaluation.
        prediction: What is judged.
        uris: Output folder of each version, complete.

    Raises:
        ConfigInvalid: Labels that fit no class, or are no numbers.
        SetupError: The outputs are not of the same rows, no row is left to compare, or they need
            more memory than is allowed.
    """
    outputs = [_Output.open(uri) for uri in uris]
    shards = _same_shards(outputs)
    most = sum(min(output.commits[shard].rows_out for output in outputs) for shard in shards)
    refuse_too_many(spec, prediction, most)
    columns = list(dict.fromkeys([ROW_COLUMN, spec.label, *spec.segments]))
    predicted = PREFIX + prediction.name
    judge = _Judge(spec, prediction, most)
    for shard in shards:
        tables = [output.read(shard, [*columns, predicted]) for output in outputs]
        known = [table for table in tables if table is not None]
        if len(known) == len(tables):
            judge.add(_on_same_rows(known), predicted)
    rows_in = sum(outputs[0].commits[shard].rows_in for shard in shards)
    letters = tuple(sum(c.dead_letters for c in output.commits.values()) for output in outputs)
    return judge.result(rows_in, letters)


@dataclass(frozen=True, slots=True)
class _Output:
    """What one version's job wrote."""

    fs: Any
    path: str
    commits: Mapping[int, Commit]

    @classmethod
    def open(cls, uri: str) -> _Output:
        fs, path = open_filesystem(uri)
        commits = {commit.shard: commit for commit in OutputFolder(fs, path).commits()}
        return cls(fs, path.rstrip("/"), commits)

    def read(self, shard: int, columns: Sequence[str]) -> pa.Table | None:
        """The rows of a shard; None where it has none."""
        name = self.commits[shard].file
        if name is None:
            return None
        path = f"{self.path}/{name}"
        with reading(path), pq.ParquetFile(path, filesystem=self.fs) as file:
            return file.read(columns=list(columns))


def _same_shards(outputs: Sequence[_Output]) -> list[int]:
    """The numbers of the shards.

    Raises:
        SetupError: The outputs are not of the same shards.
    """
    base = outputs[0]
    for output in outputs[1:]:
        sizes = {shard: commit.rows_in for shard, commit in output.commits.items()}
        if sizes != {shard: commit.rows_in for shard, commit in base.commits.items()}:
            raise SetupError(
                f"{base.path} and {output.path} are not of the same rows: the input changed "
                "between the two. Mend: run it again with --restart"
            )
    return sorted(base.commits)


def _on_same_rows(tables: Sequence[pa.Table]) -> list[pa.Table]:
    """The rows that all have, in the same order."""
    positions = [table[ROW_COLUMN].to_numpy() for table in tables]
    if all(np.array_equal(positions[0], each) for each in positions[1:]):
        return list(tables)
    shared = reduce(lambda one, two: np.intersect1d(one, two, assume_unique=True), positions)
    # Positions rise within a shard: its rows are written in the order of the input.
    return [
        table.take(pa.array(np.searchsorted(each, shared)))
        for table, each in zip(tables, positions, strict=True)
    ]


class _Judge:
    """Takes in rows, a shard at a time.

    Args:
        spec: The evaluation.
        prediction: What is judged.
        most: Rows that may come.
    """

    def __init__(self, spec: EvaluationSpec, prediction: Prediction, most: int) -> None:
        versions = len(spec.versions)
        self._spec, self._prediction = spec, prediction
        self._classes = ClassTable.of(spec, prediction.kind, prediction.width)
        self._segments = [
            SegmentTable(column, f"segments[{index}]") for index, column in enumerate(spec.segments)
        ]
        label_type = {"binary": np.bool_, "multiclass": np.int32, "regression": np.float64}
        self._labels: Array = np.empty(most, label_type[spec.task])
        self._codes = np.empty((len(spec.segments), most), np.int16)
        self._kept = {
            name: np.empty((versions, most), dtype) for name, dtype in self._parts().items()
        }
        self._rows = self._predicted = self._label_missing = self._not_finite = 0
        self._not_finite_of = np.zeros(versions, np.int64)
        self._probabilities = True

    def _parts(self) -> dict[str, type[np.generic]]:
        if self._spec.task == "binary":
            return {"scores": np.float32}
        if self._spec.task == "regression":
            return {"predictions": np.float64}
        scores = {"log_losses": np.float32, "ranks": np.int32}
        return {"predicted": np.int32, **(scores if self._prediction.kind == "scores" else {})}

    def add(self, tables: Sequence[pa.Table], predicted: str) -> None:
        """Takes the same rows of all versions."""
        labels, known = self._label(tables[0][self._spec.label])
        parts = [self._read(table[predicted], labels) for table in tables]
        finite = np.stack([mask for _, mask in parts])
        good = known & finite.all(axis=0)
        self._predicted += len(good)
        self._label_missing += int((~known).sum())
        self._not_finite += int((known & ~good).sum())
        self._not_finite_of += (known & ~finite).sum(axis=1)
        start, stop = self._rows, self._rows + int(good.sum())
        self._labels[start:stop] = labels[good]
        for version, (values, _) in enumerate(parts):
            for name, array in values.items():
                self._kept[name][version, start:stop] = array[good]
                if name == "scores":
                    self._see_scores(array[good])
        for index, table in enumerate(self._segments):
            codes = table.codes(tables[0][table.column])
            self._codes[index, start:stop] = codes[good]
        self._rows = stop

    def _label(self, column: pa.ChunkedArray) -> tuple[Array, Mask]:
        """Of each row, and which rows have one."""
        if self._spec.task == "regression":
            return read_numbers(column, self._spec.label)
        codes = self._classes.codes(column)
        return np.maximum(codes, 0), codes >= 0

    def _read(self, column: pa.ChunkedArray, labels: Array) -> tuple[dict[str, Array], Mask]:
        """What is kept of predictions, and which of them are finite numbers."""
        kind, task = self._prediction.kind, self._spec.task
        if kind == "class":
            codes = self._classes.codes(column, predicted=True)
            name = "scores" if task == "binary" else "predicted"
            return {name: codes}, np.ones(len(codes), np.bool_)
        if kind != "scores":
            values = column.to_numpy()
            name = "scores" if task == "binary" else "predictions"
            return {name: values}, np.asarray(np.isfinite(values))
        scores = self._matrix(column)
        finite = np.asarray(np.isfinite(scores).all(axis=1))
        if task == "binary":
            if scores.shape[1] != 2:
                raise fault_at("prediction", f"{scores.shape[1]} scores a row; binary takes two")
            self._see_rows(scores[finite])
            return {"scores": scores[:, self._classes.positive_place]}, finite
        width = len(self._classes.texts)
        if scores.shape[1] != width:
            message = f"{scores.shape[1]} scores a row, and {width} classes"
            raise fault_at("classes", message)
        self._see_rows(scores[finite])
        return _judge_scores(scores, labels), finite

    def _matrix(self, column: pa.ChunkedArray) -> Array:
        array = column.combine_chunks()
        flat = array.flatten().to_numpy(zero_copy_only=False)
        width = len(flat) // len(array) if len(array) else 1
        if not pa.types.is_fixed_size_list(array.type):
            sizes = array.value_lengths().to_numpy(zero_copy_only=False)
            if len(sizes) and (sizes != sizes[0]).any():
                raise fault_at("prediction", "rows have different numbers of scores")
        self._classes.settle(width)
        return np.asarray(flat).reshape(len(array), width)

    def _see_scores(self, scores: Array) -> None:
        inside = not len(scores) or bool(scores.min() >= 0 and scores.max() <= 1)
        self._probabilities &= inside

    def _see_rows(self, scores: Array) -> None:
        sums = scores.sum(axis=1, dtype=np.float64)
        whole = bool((np.abs(sums - 1) <= _SUM_TOLERANCE).all())
        self._probabilities &= whole and (not len(scores) or bool(scores.min() >= 0))

    def result(self, rows_in: int, dead_letters: tuple[int, ...]) -> Evaluated:
        """Everything that was taken in.

        Raises:
            SetupError: No row is left.
        """
        counts = Counts(
            rows_in=rows_in,
            not_predicted=rows_in - self._predicted,
            dead_letters=dead_letters,
            label_missing=self._label_missing,
            not_finite=self._not_finite,
            not_finite_of=tuple(int(count) for count in self._not_finite_of),
            compared=self._rows,
        )
        if not self._rows:
            raise SetupError(
                f"no row is left to compare: of {counts.rows_in:,} rows {counts.not_predicted:,} "
                f"lack a prediction, {counts.label_missing:,} have no label in column "
                f"{self._spec.label!r}, and {counts.not_finite:,} were predicted as NaN or infinity"
            )
        return Evaluated(
            self._scored(),
            self._codes[:, : self._rows],
            tuple(tuple(table.values) for table in self._segments),
            tuple(self._classes.texts) if self._spec.task != "regression" else (),
            counts,
        )

    def _scored(self) -> BinaryRows | MulticlassRows | RegressionRows:
        labels = self._labels[: self._rows]
        kept = {name: array[:, : self._rows] for name, array in self._kept.items()}
        ranked = self._prediction.kind != "class"
        if self._spec.task == "binary":
            threshold = self._spec.threshold if ranked else 0.5
            return BinaryRows(labels, kept["scores"], threshold, ranked, self._probabilities)
        if self._spec.task == "regression":
            return RegressionRows(labels, kept["predictions"])
        return MulticlassRows(
            labels,
            kept["predicted"],
            len(self._classes.texts),
            kept.get("log_losses") if self._probabilities else None,
            kept.get("ranks"),
            self._spec.top_k,
        )


def _judge_scores(scores: Array, labels: Array) -> dict[str, Array]:
    """Predicted class, log loss and rank of the true class; classes of equal score rank before."""
    own = np.take_along_axis(scores, labels[:, np.newaxis].astype(np.int64), axis=1)
    with np.errstate(invalid="ignore"):
        ranks = (scores >= own).sum(axis=1) - 1
    return {
        "predicted": scores.argmax(axis=1),
        "log_losses": log_losses(own[:, 0]),
        "ranks": ranks,
    }
