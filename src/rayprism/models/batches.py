"""Small things that are done to batches around a runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rayprism.core.tensors import Array, Tensors, TensorSpec, count_rows, split_rows
from rayprism.errors import ModelFailed

__all__ = ["fixed_rows", "plain_outputs", "resize_rows", "run_fixed"]


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
