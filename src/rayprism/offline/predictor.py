"""Many rows through one loaded model, under the bounds that it has online.

Every row that goes in either has a prediction, at its own place, or a reason why not. NaN in an
output is a prediction, as it is online. Batches that do not fit into memory are halved, and those
after them are smaller, as online too.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa

from rayprism.core.batching import BatchLimits
from rayprism.core.memory import MemoryLimit
from rayprism.core.tensors import (
    Array,
    Datatype,
    RaggedAxis,
    Tensors,
    TensorSpec,
    numpy_dtype,
)
from rayprism.errors import InvalidInput, ModelFailed, OutOfMemory, RequestError
from rayprism.models.manifest import Batching, Manifest
from rayprism.offline.outputs import inner_shape
from rayprism.offline.rows import Faults, Mask, RaggedRows, RowFault, Rows, RowTensors

__all__ = ["Predicted", "Predictor", "Runner", "offline_limits"]

_MOST_REASON = 2000
_log = logging.getLogger(__name__)
_Batch = slice | Rows


class Runner(Protocol):
    """What is needed of a `rayprism.models.loader.LoadedModel`."""

    manifest: Manifest
    has_prepare: bool

    def prepare(self, inputs: Tensors) -> Tensors:
        """Makes the runtime's inputs out of a request's."""

    def run(self, batch: Tensors) -> Tensors:
        """Runs one batch; any exception means that it failed."""


@dataclass(frozen=True, slots=True)
class Predicted:
    """What became of some rows.

    Args:
        outputs: Of the good rows only, in their order. Where the model is not batched, axis 0 is
            still the row. Rows of different shapes, as of ragged outputs, are `RaggedRows`.
        ok: Which rows are good. Shape: `[rows]`.
        reasons: Of the other rows, by their index.
    """

    outputs: RowTensors
    ok: Mask
    reasons: dict[int, RowFault]


def offline_limits(batching: Batching, batch_rows: int | None) -> BatchLimits:
    """The bounds in force: the manifest's hints, overridden by the job.

    Args:
        batching: The manifest's hints.
        batch_rows: Most rows of a batch; None: as the manifest says. The bounds of cost and
            padding hold in any case.
    """
    return BatchLimits(
        max_rows=(batch_rows or batching.max_rows) if batching.batched else 1,
        max_queue_rows=0,
        max_cost=batching.max_cost if batching.ragged else None,
        max_padding_share=batching.max_padding_share,
    )


class Predictor:
    """Runs rows through a model.

    Args:
        model: Loaded.
        batch_rows: Most rows of a batch; by default the manifest's hint, which is made for
            latency: small models want thousands.
        clock: Seconds, monotonic.

    Raises:
        ValueError: `batch_rows` is not at least 1.
    """

    def __init__(
        self,
        model: Runner,
        batch_rows: int | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if batch_rows is not None and batch_rows < 1:
            raise ValueError(f"batch_rows {batch_rows}: 1 or more")
        self._model = model
        self._manifest = model.manifest
        self._batching = model.manifest.batching
        self.limits = offline_limits(self._batching, batch_rows)
        """As they were asked for; what memory allows may be less."""
        self._memory = MemoryLimit(bool(self._batching.ragged))
        self._clock = clock

    def predict(
        self, tensors: Mapping[str, Array | RaggedRows], rows: int, *, prepared: bool = False
    ) -> Predicted:
        """Predicts rows.

        Rows of ragged models are sorted by length among those that are given, so that little is
        padding; the more are given at once, the less.

        Args:
            tensors: What the manifest's inputs name, checked (`ColumnMap.tensors`); axis 0 is the
                row, whether or not the model is batched.
            rows: How many.
            prepared: Whether the tensors are what `prepare` gave, elsewhere.
        """
        work = _Work(rows, self._manifest.outputs, self._batching)
        run: Callable[[Tensors], Tensors] = self._model.run
        if self._model.has_prepare and not prepared:
            if self._batching.ragged:
                tensors = self._prepare_each(tensors, work)
            else:
                run = self._prepare_and_run
        if work.faults.ok.any():
            lengths = self._lengths(tensors, work.faults)
            for batch in self._batches(tensors, lengths, work.faults.ok):
                self._run_halving(run, tensors, batch, lengths, work)
        return work.result()

    def prepare(self, tensors: Mapping[str, Array | RaggedRows], rows: int) -> Predicted:
        """Does the pre-processing alone, for a `predict` elsewhere.

        Args:
            tensors: What the manifest's inputs name, as for `predict`.
            rows: How many.

        Returns:
            `outputs` are the runtime's inputs of the good rows.
        """
        work = _Work(rows, self._manifest.inner_inputs, Batching(batched=self._batching.batched))
        if not self._batching.ragged:
            lengths: Rows = np.ones(rows, np.int64)
            for batch in self._batches(tensors, lengths, work.faults.ok):
                self._run_halving(self._model.prepare, tensors, batch, lengths, work)
            return work.result()
        each = self._prepare_each(tensors, work)
        ok = work.faults.ok
        good = {
            name: value[ok] if isinstance(value, np.ndarray) else value.take(ok).simplify()
            for name, value in each.items()
        }
        return Predicted(good, ok, dict(sorted(work.faults.reasons.items())))

    def _prepare_and_run(self, inputs: Tensors) -> Tensors:
        return self._model.run(self._model.prepare(inputs))

    def _prepare_each(
        self, tensors: Mapping[str, Array | RaggedRows], work: _Work
    ) -> Mapping[str, Array | RaggedRows]:
        """The runtime's inputs, row by row; nothing where a row is at fault.

        One by one: the length of a row is known only then, and what is padded together with others
        cannot be told from padding any more.
        """
        specs = self._manifest.inner_inputs
        found: dict[str, list[Array]] = {spec.name: [] for spec in specs}
        for row in range(len(work.faults.ok)):
            try:
                prepared = self._model.prepare(_gather(tensors, slice(row, row + 1), {}))
            except Exception as error:
                work.fail(row, error)
                prepared = {spec.name: _nothing(spec) for spec in specs}
            for name, rows in found.items():
                rows.append(prepared[name].reshape(prepared[name].shape[1:]))
        return {
            spec.name: RaggedRows.from_arrays(
                found[spec.name], numpy_dtype(spec.datatype)
            ).simplify()
            for spec in specs
        }

    def _lengths(self, tensors: Mapping[str, Array | RaggedRows], faults: Faults) -> Rows:
        """Of each row along its ragged axis; 1 where the model has none. At least 1."""
        lengths: Rows = np.ones(len(faults.ok), np.int64)
        length_of = ""
        for name, rule in self._batching.ragged.items():
            value = tensors[name]
            if isinstance(value, RaggedRows):
                mine = value.shapes[:, rule.axis - 1]
            else:
                mine = np.full(len(value), value.shape[rule.axis], np.int64)
            if not length_of:
                lengths, length_of = mine, name
                continue
            apart = np.flatnonzero((mine != lengths) & faults.ok)
            faults.add(apart, InvalidInput.code, _told_apart(name, mine, length_of, lengths, apart))
        return np.maximum(lengths, 1)

    def _batches(
        self, tensors: Mapping[str, Array | RaggedRows], lengths: Rows, ok: Mask
    ) -> Iterator[_Batch]:
        uneven = {name: v for name, v in tensors.items() if isinstance(v, RaggedRows)}
        if not uneven and ok.all():
            start = 0
            while start < len(ok):
                stop = min(start + self._most_rows(int(lengths[0])), len(ok))
                yield slice(start, stop)
                start = stop
            return
        kinds = _kinds(uneven, self._batching.ragged, len(ok))
        good = np.flatnonzero(ok)
        # Longest first within a kind: the cost of a batch is then known from its first row, and
        # padding only grows with each further one.
        order = good[np.lexsort((-lengths[good], kinds[good]))]
        start = 0
        while start < len(order):
            limits = self._memory.bound(self.limits)
            window = order[start : start + limits.max_rows]
            count = _fitting(lengths[window], kinds[window], limits)
            yield window[:count]
            start += count

    def _most_rows(self, length: int) -> int:
        limits = self._memory.bound(self.limits)
        if limits.max_cost is None:
            return limits.max_rows
        return min(limits.max_rows, max(1, limits.max_cost // length))

    def _learn(self, batch: _Batch, lengths: Rows, error: Exception | None) -> None:
        """Takes into account that a batch has run, or has not fitted into memory."""
        memory, now_s = self._memory, self._clock()
        if error is None:
            memory.ran(self.limits, now_s)
            return
        rows = len(lengths[batch])
        cost = rows * int(lengths[batch].max())
        if rows > 1 and memory.ran_out(cost, now_s):
            _log.warning(
                "A batch of %d rows does not fit into memory (%s); batches may cost %d at most for "
                "now.",
                rows,
                error,
                memory.cost,
            )

    def _run_halving(
        self,
        run: Callable[[Tensors], Tensors],
        tensors: Mapping[str, Array | RaggedRows],
        batch: _Batch,
        lengths: Rows,
        work: _Work,
    ) -> None:
        """Runs a batch; where it fails, its halves, until the rows at fault are alone."""
        batched = self._batching.batched
        waiting = [batch]
        while waiting:
            batch = waiting.pop()
            try:
                inputs = _gather(tensors, batch, self._batching.ragged)
                if batched:
                    outputs = run(inputs)
                else:
                    outputs = run({name: array[0] for name, array in inputs.items()})
                    outputs = {name: array[np.newaxis] for name, array in outputs.items()}
                work.check(outputs)
            except Exception as error:
                if isinstance(error, OutOfMemory):
                    self._learn(batch, lengths, error)
                halves = _halves(batch)
                if halves is None:
                    row = batch.start if isinstance(batch, slice) else batch[0]
                    work.fail(int(row), error)
                else:
                    waiting.extend(reversed(halves))
            else:
                if self._memory.cost is not None:
                    self._learn(batch, lengths, None)
                work.keep(batch, outputs, lengths)


class _Work:
    """What is known of the rows so far."""

    def __init__(self, rows: int, specs: Sequence[TensorSpec], batching: Batching) -> None:
        self.faults = Faults(rows)
        self._specs = specs
        self._batched = batching.batched
        self._cuts = batching.ragged_outputs
        self._outputs = {spec.name: _Output(rows) for spec in specs}

    def check(self, outputs: Tensors) -> None:
        """Raises ModelFailed for what columns of one type could not hold."""
        _check_outputs(outputs, self._specs, self._batched)

    def fail(self, row: int, error: Exception) -> None:
        """Tells why a row has no prediction."""
        if isinstance(error, RequestError):
            code, reason = error.code, str(error)
        else:
            code, reason = ModelFailed.code, f"{type(error).__name__}: {error}"
        self.faults.add([row], code, lambda _: reason[:_MOST_REASON])

    def keep(self, batch: _Batch, outputs: Tensors, lengths: Rows) -> None:
        """Takes what a batch gave."""
        for name, kept in self._outputs.items():
            array = outputs[name]
            axis = self._cuts.get(name)
            if axis is not None and (lengths[batch] != array.shape[axis]).any():
                before = (slice(None),) * (axis - 1)
                kept.put_each(
                    batch,
                    [
                        row[(*before, slice(length))].copy()
                        for row, length in zip(array, lengths[batch], strict=True)
                    ],
                )
            else:
                kept.put(batch, array)

    def result(self) -> Predicted:
        """Everything, the good rows in their order."""
        faults = self.faults
        outputs = {
            spec.name: self._outputs[spec.name].collect(faults.ok, spec, self._batched)
            for spec in self._specs
        }
        return Predicted(outputs, faults.ok, dict(sorted(faults.reasons.items())))


class _Output:
    """One output of all rows: an array, or a list where the shapes of rows differ."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._array: Array | None = None
        self._each: list[Array | None] | None = None

    def put(self, batch: _Batch, array: Array) -> None:
        """Copies rows in: a model may use its memory again."""
        if self._array is None and self._each is None:
            self._array = np.empty((self._rows, *array.shape[1:]), array.dtype)
        if self._array is not None and array.shape[1:] == self._array.shape[1:]:
            self._array[batch] = array
        else:
            self.put_each(batch, list(array.copy()))

    def put_each(self, batch: _Batch, rows: list[Array]) -> None:
        """Takes rows of different shapes."""
        if self._each is None:
            # What is not filled in yet is not read before it is.
            self._each = [None] * self._rows if self._array is None else list(self._array)
            self._array = None
        places = range(batch.start, batch.stop) if isinstance(batch, slice) else batch
        for place, row in zip(places, rows, strict=True):
            self._each[place] = row

    def collect(self, ok: Mask, spec: TensorSpec, batched: bool) -> Array | RaggedRows:
        """The good rows."""
        if self._each is not None:
            good = [np.asarray(self._each[row]) for row in np.flatnonzero(ok)]
            return RaggedRows.from_arrays(good, numpy_dtype(spec.datatype)).simplify()
        if self._array is not None:
            return self._array if ok.all() else self._array[ok]
        shape = (max(size, 0) for size in inner_shape(spec, batched))
        return np.empty((0, *shape), numpy_dtype(spec.datatype))


def _nothing(spec: TensorSpec) -> Array:
    return np.empty((1, *(0 for _ in spec.shape[1:])), numpy_dtype(spec.datatype))


def _told_apart(
    name: str, mine: Rows, other: str, lengths: Rows, rows: Rows
) -> Callable[[int], str]:
    return lambda place: (
        f"input {name!r} has length {mine[rows[place]]}, {other!r} has {lengths[rows[place]]}: "
        "ragged inputs of one row need the same length"
    )


def _kinds(uneven: Mapping[str, RaggedRows], ragged: Mapping[str, RaggedAxis], rows: int) -> Rows:
    """Rows of equal numbers may share a batch: all their sizes but ragged ones are equal."""
    sizes = [
        np.delete(value.shapes, ragged[name].axis - 1, axis=1) if name in ragged else value.shapes
        for name, value in uneven.items()
    ]
    joined = np.concatenate(sizes, axis=1) if sizes else np.zeros((rows, 0), np.int64)
    if joined.shape[1] == 0:
        return np.zeros(rows, np.int64)
    return np.unique(joined, axis=0, return_inverse=True)[1].reshape(rows)


def _fitting(lengths: Rows, kinds: Rows, limits: BatchLimits) -> int:
    """How many of these rows, the longest first, make a batch; at least 1."""
    cost = np.arange(1, len(lengths) + 1) * lengths[0]
    fits = (kinds == kinds[0]) & (1.0 - np.cumsum(lengths) / cost <= limits.max_padding_share)
    if limits.max_cost is not None:
        fits &= cost <= limits.max_cost
    return len(fits) if fits.all() else max(1, int(np.argmin(fits)))


def _gather(
    tensors: Mapping[str, Array | RaggedRows], batch: _Batch, ragged: Mapping[str, RaggedAxis]
) -> Tensors:
    gathered: Tensors = {}
    for name, value in tensors.items():
        if isinstance(value, RaggedRows):
            rows = np.arange(batch.start, batch.stop) if isinstance(batch, slice) else batch
            gathered[name] = value.stack(rows, ragged[name].value if name in ragged else 0)
        else:
            gathered[name] = value[batch]
    return gathered


def _halves(batch: _Batch) -> tuple[_Batch, _Batch] | None:
    if isinstance(batch, slice):
        middle = (batch.start + batch.stop) // 2
        if middle == batch.start:
            return None
        return slice(batch.start, middle), slice(middle, batch.stop)
    middle = len(batch) // 2
    return (batch[:middle], batch[middle:]) if middle else None


def _check_outputs(outputs: Tensors, specs: Sequence[TensorSpec], batched: bool) -> None:
    """Refuses what columns of one type could not hold.

    Raises:
        ModelFailed: An output has other sizes than the manifest says, or is not UTF-8.
    """
    for spec in specs:
        array = outputs[spec.name]
        allowed = inner_shape(spec, batched)
        if len(array.shape) - 1 != len(allowed) or any(
            need not in (-1, have) for have, need in zip(array.shape[1:], allowed, strict=True)
        ):
            raise ModelFailed(
                f"output {spec.name!r} has rows of shape {list(array.shape[1:])}, the manifest "
                f"says {list(allowed)} (-1: any size)"
            )
        if spec.datatype is Datatype.BYTES:
            try:
                pa.array(array.ravel(), pa.binary()).cast(pa.string())
            except pa.ArrowInvalid:
                raise ModelFailed(f"output {spec.name!r} is not UTF-8") from None
