"""The first runs of a loaded model, before anybody waits for it.

What is set up once is set up by then, and how long the largest batch takes is known.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from rayprism.core.tensors import Tensors, ragged_length
from rayprism.errors import LoadFailed, OutOfMemory
from rayprism.models.batches import resize_rows
from rayprism.models.manifest import Batching

if TYPE_CHECKING:
    from rayprism.models.loader import LoadedModel

__all__ = ["warm_up"]

# What the largest batch of the warm-up may take. A replica that is needed is needed soon, and a
# model so slow that this cuts its batch is never run on the event loop, whatever was measured.
_WARM_UP_LIMIT_S = 0.05
# A run shorter than this is measured twice. On a GPU every one is: the first may compile.
_MEASURE_ONCE_S = 0.5
# On a GPU, whose time hardly grows with the rows, the largest batch is run unless one row takes
# longer than this.
_ONE_ROW_LIMIT_S = 1.0


def warm_up(model: LoadedModel, example: Tensors) -> None:
    """Runs 1 row and the largest batch that is soon done, then the manifest's own shapes.

    Args:
        model: Opened.
        example: Its golden example, as the runtime takes it: repeated, these are values that the
            model is known to take.

    Raises:
        LoadFailed: The model raised, or not even a row fits into memory.
    """
    with _room_asked_for(model):
        _run_all(model, example)


def _run_all(model: LoadedModel, example: Tensors) -> None:
    batching = model.manifest.batching
    on_gpu = model.device != "cpu"
    if not batching.batched:
        taken_s, rows = _timed_run(model, example), 1
    else:
        rows = 1 if model._fixed_rows is None else model._fixed_rows
        taken_s = _timed_run(model, resize_rows(example, rows))
        wanted = max(_most_rows(batching, example), rows)
        if on_gpu:
            soon_done = wanted if taken_s < _ONE_ROW_LIMIT_S else rows
        else:
            soon_done = min(wanted, int(rows * _WARM_UP_LIMIT_S / taken_s))
        if soon_done > rows:
            least = rows
            taken_s, rows = _largest_run(model, example, least, soon_done, taken_s)
            if on_gpu:
                _run_between(model, example, least, rows)
        if rows < wanted:
            model.notes = (
                f"warmed up with {rows} of at most {wanted} rows, which took {taken_s:.3g} s",
            )
    model.measured_rows, model.measured_run_s = rows, taken_s
    for shapes in model.manifest.warmup:
        _one_run(model, {name: np.resize(example[name], shape) for name, shape in shapes.items()})


def _largest_run(
    model: LoadedModel, example: Tensors, least: int, most: int, least_s: float
) -> tuple[float, int]:
    """Runs the most rows that fit into memory; gives seconds and rows.

    What fits is found under load, too (`rayprism.core.memory`); here it only has to be warm.
    """
    rows = most
    while rows > least:
        try:
            return _timed_run(model, resize_rows(example, rows)), rows
        except OutOfMemory:
            rows //= 2
    return least_s, least


def _run_between(model: LoadedModel, example: Tensors, least: int, most: int) -> None:
    """Sizes between: for each a GPU may have a kernel to load, or an algorithm to look for.

    After the largest one, so that TensorRT has built for all of them.
    """
    rows = 2 * least
    while rows < most:
        _one_run(model, resize_rows(example, rows))
        rows *= 2


def _most_rows(batching: Batching, example: Tensors) -> int:
    if batching.max_cost is None:
        return batching.max_rows
    return min(batching.max_rows, batching.max_cost // ragged_length(example, batching.ragged))


def _timed_run(model: LoadedModel, batch: Tensors) -> float:
    """Seconds of a run; the better of two where that costs little.

    What the first run pays once must not be taken for the model's speed.
    """
    first_s = _one_run(model, batch)
    if first_s >= _MEASURE_ONCE_S and model.device == "cpu":
        return first_s
    return min(first_s, _one_run(model, batch))


def _one_run(model: LoadedModel, batch: Tensors) -> float:
    started = time.perf_counter()
    try:
        model.run(batch)
    except OutOfMemory:
        raise
    except Exception as error:
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in batch.items())
        hint = ""
        if model.manifest.batching.batched:
            hint = ". If axis 0 is not the row, push with batching {batched: false, max_rows: 1}"
        raise LoadFailed(
            f"{model._name}: warming up with {shapes} raised {type(error).__name__}: {error}{hint}"
        ) from error
    return time.perf_counter() - started


@contextmanager
def _room_asked_for(model: LoadedModel) -> Iterator[None]:
    """Tells what to do where not even one row, or a shape of the manifest, fits into memory."""
    try:
        yield
    except OutOfMemory as error:
        limit = model.gpu_limit_bytes
        told = "" if limit is None else f", of which it may use {limit / 1024**2:,.0f} MiB"
        raise LoadFailed(
            f"{error}; this was while warming up{told}. Mend: give it more memory, on a GPU a "
            "larger part of it (num_gpus); or make its rows, or the manifest's warmup, smaller"
        ) from error
