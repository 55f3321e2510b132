"""Datatypes, tensor specs, and the checks that named arrays pass before a model sees them.

A batch is a `Tensors`: a dict from tensor name to a numpy array. BYTES tensors are object arrays
whose items are `bytes`. Where a model is batched, the first axis of every array is the row.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from rayprism.errors import InvalidInput

__all__ = [
    "Array",
    "Datatype",
    "RaggedAxis",
    "TensorSpec",
    "Tensors",
    "batch_key",
    "check_inputs",
    "concatenate",
    "count_rows",
    "datatype_of",
    "item_size_bytes",
    "numpy_dtype",
    "ragged_length",
    "split_rows",
    "suggest",
]

Array = npt.NDArray[Any]
Tensors = dict[str, Array]


class Datatype(StrEnum):
    """The tensor datatypes of the Open Inference Protocol.

    Source: Open Inference Protocol v2, "Tensor Data Types", plus BF16 from Triton's extension.
    """

    BOOL = "BOOL"
    UINT8 = "UINT8"
    UINT16 = "UINT16"
    UINT32 = "UINT32"
    UINT64 = "UINT64"
    INT8 = "INT8"
    INT16 = "INT16"
    INT32 = "INT32"
    INT64 = "INT64"
    FP16 = "FP16"
    BF16 = "BF16"
    FP32 = "FP32"
    FP64 = "FP64"
    BYTES = "BYTES"

    @property
    def is_float(self) -> bool:
        """Whether values may be NaN or infinite."""
        return self in _FLOATS

    @property
    def is_integer(self) -> bool:
        """Whether values are whole numbers (BOOL is not one)."""
        return self in _INTEGERS


_FLOATS = frozenset({Datatype.FP16, Datatype.BF16, Datatype.FP32, Datatype.FP64})
_INTEGERS = frozenset(
    {
        Datatype.UINT8,
        Datatype.UINT16,
        Datatype.UINT32,
        Datatype.UINT64,
        Datatype.INT8,
        Datatype.INT16,
        Datatype.INT32,
        Datatype.INT64,
    }
)

_NUMPY: dict[Datatype, np.dtype[Any]] = {
    Datatype.BOOL: np.dtype(np.bool_),
    Datatype.UINT8: np.dtype(np.uint8),
    Datatype.UINT16: np.dtype(np.uint16),
    Datatype.UINT32: np.dtype(np.uint32),
    Datatype.UINT64: np.dtype(np.uint64),
    Datatype.INT8: np.dtype(np.int8),
    Datatype.INT16: np.dtype(np.int16),
    Datatype.INT32: np.dtype(np.int32),
    Datatype.INT64: np.dtype(np.int64),
    Datatype.FP16: np.dtype(np.float16),
    Datatype.BF16: np.dtype(ml_dtypes.bfloat16),
    Datatype.FP32: np.dtype(np.float32),
    Datatype.FP64: np.dtype(np.float64),
    Datatype.BYTES: np.dtype(np.object_),
}
_DATATYPE_BY_NUMPY = {dtype: datatype for datatype, dtype in _NUMPY.items()}

_NAME = re.compile(r"[^\x00-\x1f\x7f]{1,256}")


def numpy_dtype(datatype: Datatype) -> np.dtype[Any]:
    """The numpy dtype that carries a datatype. BYTES are object arrays of `bytes`."""
    return _NUMPY[datatype]


def item_size_bytes(datatype: Datatype) -> int | None:
    """Bytes of one element on the wire, or None for BYTES, whose elements carry their length."""
    return None if datatype is Datatype.BYTES else _NUMPY[datatype].itemsize


def datatype_of(array: Array) -> Datatype:
    """The datatype of an array as models return them: strings of any kind count as BYTES.

    Raises:
        ValueError: numpy's dtype has no counterpart in the protocol (complex, datetime, ...).
    """
    found = _DATATYPE_BY_NUMPY.get(array.dtype)
    if found is not None:
        return found
    if array.dtype.kind in "US":
        return Datatype.BYTES
    raise ValueError(f"numpy dtype {array.dtype} has no counterpart among {', '.join(Datatype)}")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What one input takes, or one output gives.

    Args:
        name: The tensor's name in the model.
        datatype: Of its elements.
        shape: One number an axis, -1 where the size is free. Where the model is batched, the
            first axis is the row, and is -1 or the fixed batch that the model was exported with.
        allow_nan: Whether a float input may hold NaN.
        description: For people; shown in the docs page.
    """

    name: str
    datatype: Datatype
    shape: tuple[int, ...]
    allow_nan: bool = True
    description: str = ""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(
                f"tensor name {self.name!r}: 1 to 256 characters, no control characters"
            )
        wrong = [size for size in self.shape if size < -1 or size == 0]
        if wrong:
            raise ValueError(
                f"shape {list(self.shape)} of {self.name!r}: an axis is -1 (free) or a size from 1"
            )


@dataclass(frozen=True, slots=True)
class RaggedAxis:
    """An axis whose length differs between requests; the framework pads it inside a batch.

    Args:
        axis: Which axis, counted from 0; never the row axis 0.
        value: What to pad with, cast to the tensor's dtype.
    """

    axis: int
    value: float = 0

    def __post_init__(self) -> None:
        if self.axis < 1:
            raise ValueError(f"axis {self.axis}: from 1 (axis 0 is the row)")


def suggest(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for a near miss, else an empty string."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return f" Did you mean {by_lower[near[0]]!r}?" if near else ""


def check_inputs(
    specs: Sequence[TensorSpec],
    tensors: Mapping[str, Array],
    *,
    batched: bool,
    ragged: Mapping[str, RaggedAxis] | None = None,
) -> int:
    """Checks that the arrays are what the specs ask for, and counts the rows.

    Args:
        specs: One for each input of the model.
        tensors: The arrays that came.
        batched: Whether axis 0 is the row.
        ragged: Ragged axes by tensor name: tensors that share the ragged length must agree on it.

    Returns:
        The number of rows, at least 1; 1 where the model is not batched.

    Raises:
        InvalidInput: Names every fault: missing, extra, misnamed, wrong datatype or shape, no
            rows, rows that differ between inputs, NaN where it is forbidden.
    """
    faults: list[str] = []
    rows = -1
    rows_of = ""
    for spec in specs:
        array = tensors.get(spec.name)
        if array is None:
            faults.append(
                f"input {spec.name!r} is missing ({spec.datatype}, shape {list(spec.shape)})"
            )
            continue
        if array.dtype != _NUMPY[spec.datatype]:
            faults.append(
                f"input {spec.name!r}: datatype is {_describe_dtype(array)}, "
                f"allowed is {spec.datatype}"
            )
            continue
        fault = _shape_fault(spec, array.shape, batched)
        if fault:
            faults.append(fault)
            continue
        if batched:
            if rows == -1:
                rows, rows_of = array.shape[0], spec.name
            elif array.shape[0] != rows:
                faults.append(
                    f"input {spec.name!r} has {array.shape[0]} rows, {rows_of!r} has {rows}: "
                    "all inputs need the same number of rows"
                )
                continue
        if not spec.allow_nan and spec.datatype.is_float and _holds_nan(array):
            faults.append(f"input {spec.name!r} holds NaN, which this model does not take")
    if len(tensors) > len(specs) or faults:
        names = [spec.name for spec in specs]
        faults.extend(
            f"input {name!r} is not an input of this model.{suggest(name, names)} "
            f"Its inputs: {', '.join(names)}"
            for name in tensors
            if name not in names
        )
    if faults:
        raise InvalidInput("; ".join(faults))
    if batched and rows == 0:
        raise InvalidInput("0 rows: a request needs at least 1 row")
    if ragged:
        ragged_length(tensors, ragged)
    return rows if batched else 1


def _holds_nan(array: Array) -> bool:
    if array.size and array.dtype.kind == "f":
        # A minimum is NaN where any element is, and NaN differs from itself: half the time of the
        # other way, and no second array. Not for BF16, whose minimum warns of NaN.
        least = np.minimum.reduce(array, axis=None)
        return bool(least != least)
    with np.errstate(invalid="ignore"):  # BF16 warns of a signalling NaN even when asked for it
        return bool(np.isnan(array).any())


def _describe_dtype(array: Array) -> str:
    try:
        return str(datatype_of(array))
    except ValueError:
        return str(array.dtype)


def _shape_fault(spec: TensorSpec, shape: tuple[int, ...], batched: bool) -> str:
    if len(shape) != len(spec.shape):
        return (
            f"input {spec.name!r}: shape {list(shape)} has {len(shape)} axes, "
            f"allowed is {list(spec.shape)} (-1: any size)"
        )
    # The row axis is free to the client even where the model was exported with a fixed batch:
    # longer requests are split, and 0 rows get their own message.
    first = 1 if batched else 0
    for axis in range(first, len(shape)):
        allowed = spec.shape[axis]
        if (allowed != -1 and shape[axis] != allowed) or shape[axis] == 0:
            return (
                f"input {spec.name!r}: shape {list(shape)} does not fit {list(spec.shape)} "
                f"at axis {axis}: got {shape[axis]}, allowed is "
                f"{'any size from 1' if allowed == -1 else allowed}"
            )
    return ""


def ragged_length(tensors: Mapping[str, Array], ragged: Mapping[str, RaggedAxis]) -> int:
    """The length that ragged tensors share, in elements along their ragged axis.

    Raises:
        InvalidInput: Two ragged tensors of one request differ in length.
    """
    length, length_of = -1, ""
    for name, rule in ragged.items():
        size = tensors[name].shape[rule.axis]
        if length == -1:
            length, length_of = size, name
        elif size != length:
            raise InvalidInput(
                f"input {name!r} has length {size} along axis {rule.axis}, {length_of!r} has "
                f"{length}: ragged inputs of one request need the same length"
            )
    return max(length, 1)


def batch_key(
    tensors: Mapping[str, Array], ragged: Mapping[str, RaggedAxis]
) -> tuple[tuple[int, ...], ...]:
    """What two requests need to have equal to share a batch: all sizes but rows and ragged ones."""
    key = []
    for name in tensors if len(tensors) == 1 else sorted(tensors):
        array = tensors[name]
        rule = ragged.get(name)
        if rule is None:
            key.append(array.shape[1:])
        else:
            key.append((*array.shape[1 : rule.axis], -1, *array.shape[rule.axis + 1 :]))
    return tuple(key)


def count_rows(tensors: Mapping[str, Array]) -> int:
    """Rows of a batched set of tensors: the size of axis 0."""
    for array in tensors.values():
        return int(array.shape[0])
    return 0


def concatenate(parts: Sequence[Tensors], ragged: Mapping[str, RaggedAxis]) -> Tensors:
    """Joins requests into one batch along the rows, padding ragged axes at their end.

    Args:
        parts: At least one; all with the same names and the same `batch_key`.
        ragged: Ragged axes by tensor name.
    """
    if len(parts) == 1:
        return parts[0]
    joined: Tensors = {}
    for name in parts[0]:
        arrays = [part[name] for part in parts]
        rule = ragged.get(name)
        if rule is not None:
            arrays = _pad_to_longest(arrays, rule)
        joined[name] = np.concatenate(arrays)
    return joined


def _pad_to_longest(arrays: list[Array], rule: RaggedAxis) -> list[Array]:
    longest = max(array.shape[rule.axis] for array in arrays)
    padded = []
    for array in arrays:
        missing = longest - array.shape[rule.axis]
        if missing:
            widths = [(0, 0)] * array.ndim
            widths[rule.axis] = (0, missing)
            array = np.pad(array, widths, constant_values=array.dtype.type(rule.value))
        padded.append(array)
    return padded


def split_rows(tensors: Tensors, start: int, stop: int) -> Tensors:
    """Rows `start` to `stop` (exclusive) of every tensor, as views."""
    return {name: array[start:stop] for name, array in tensors.items()}
