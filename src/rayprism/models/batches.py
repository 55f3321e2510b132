"""Small things that are done to batches around a runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rayprism.core.tensors import (
    Array,
    RaggedAxis,
    Tensors,
    TensorSpec,
    check_inputs,
    count_rows,
    split_rows,
)
from rayprism.errors import InvalidInput, ModelFailed

__all__ = ["checked_prepared", "fixed_rows", "plain_outputs", "resize_rows", "run_fixed"]


def fixed_rows(specs: Sequence[TensorSpec], batched: bool) -> int | None:
    """The batch that a model was exported with, or None where its row axis is free.

    Args:
        specs: What the runtime takes.
        batched: Whether axis 0 is the row at all.
    """
    sizes = {spec.shape[0] for spec in specs} - {-1} if batched else set()
    return min(sizes) if sizes else None


def resize_rows(tensors: Tensors, rows: int) -> Tensors:
    """Repeats or cuts rows until there are so many. Values stay ones that the model knows."""
    return {
        name: np.resize(array, (rows, *array.shape[1:])) if array.shape[0] != rows else array
        for name, array in tensors.items()
    }


def run_fixed(run: Callable[[Tensors], Tensors], batch: Tensors, size: int) -> Tensors:
    """Runs a model that takes exactly `size` rows, padding with the last row, cutting it off."""
    rows = count_rows(batch)
    if rows == size:
        return run(batch)
    parts = []
    for start in range(0, rows, size):
        stop = min(start + size, rows)
        index = np.minimum(np.arange(start, start + size), stop - 1)
        outputs = run({name: array[index] for name, array in batch.items()})
        parts.append(split_rows(outputs, 0, stop - start))
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def plain_outputs(where: str, outputs: Any) -> Tensors:
    """What code returned, with strings of every kind turned into `bytes`.

    Raises:
        ModelFailed: It is not a dict of numpy arrays.
    """
    if not isinstance(outputs, Mapping):
        raise ModelFailed(f"{where}: its code returned {type(outputs).__name__}, allowed is a dict")
    plain: Tensors = {}
    for name, value in outputs.items():
        if not isinstance(value, np.ndarray):
            raise ModelFailed(
                f"{where}: output {name!r} is {type(value).__name__}, allowed is a numpy array"
            )
        plain[name] = _as_bytes(value) if value.dtype.kind in "OSU" else value
    return plain


def _as_bytes(array: Array) -> Array:
    raw = np.empty(array.size, object)
    raw[:] = [
        item if isinstance(item, bytes) else str(item).encode() for item in array.ravel().tolist()
    ]
    return raw.reshape(array.shape)


def checked_prepared(
    where: str,
    prepared: Any,
    specs: Sequence[TensorSpec],
    ragged: Mapping[str, RaggedAxis],
    rows: int | None,
) -> Tensors:
    """What pre-processing returned, if the runtime can take it.

    Args:
        where: The model, for messages.
        prepared: What was returned.
        specs: What the runtime takes; empty where that is not known yet.
        ragged: The runtime's ragged inputs.
        rows: The rows that went in, or None where the model is not batched.

    Raises:
        ModelFailed: It cannot.
    """
    where = f"{where}: preprocess"
    if not isinstance(prepared, dict) or not all(
        isinstance(array, np.ndarray) for array in prepared.values()
    ):
        raise ModelFailed(f"{where} returned {_kinds(prepared)}, allowed is a dict of numpy arrays")
    if specs:
        try:
            check_inputs(specs, prepared, batched=rows is not None, ragged=ragged)
        except InvalidInput as error:
            # Not the client's fault: the request was right before it was pre-processed.
            raise ModelFailed(f"{where} returned what the runtime does not take: {error}") from None
    if rows is not None and count_rows(prepared) != rows:
        raise ModelFailed(
            f"{where} made {count_rows(prepared)} rows out of {rows}: one row in is one row out"
        )
    return prepared


def _kinds(value: Any) -> str:
    if not isinstance(value, dict):
        return type(value).__name__
    return "a dict of " + ", ".join(sorted({type(item).__name__ for item in value.values()}))
