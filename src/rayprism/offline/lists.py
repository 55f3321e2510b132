"""List columns as tensors: rows of one shape without a copy, others each with its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayprism.core.tensors import Array, TensorSpec
from rayprism.offline.casts import Cast, CastFault, cast_values, plain_type
from rayprism.offline.rows import FaultCode, Faults, RaggedRows, Rows

__all__ = ["is_list", "read_lists", "unnest_type"]

_Places = list[tuple[int, int]]


def is_list(kind: Any) -> bool:
    """Whether an Arrow type is a list of any kind."""
    types = pa.types
    return bool(
        types.is_list(kind)
        or types.is_large_list(kind)
        or types.is_fixed_size_list(kind)
        or types.is_list_view(kind)
        or types.is_large_list_view(kind)
    )


def unnest_type(kind: Any) -> tuple[list[int], Any]:
    """The levels of lists in a type, and what is in them.

    Returns:
        The size of each level, -1 where rows may differ; and the type of the innermost values.
    """
    sizes = []
    kind = plain_type(kind)
    while is_list(kind):
        sizes.append(kind.list_size if pa.types.is_fixed_size_list(kind) else -1)
        kind = plain_type(kind.value_type)
    return sizes, kind


def read_lists(
    array: Any, spec: TensorSpec, inner: tuple[int, ...], faults: Faults, where: str
) -> Array | RaggedRows:
    """Casts a list column.

    Args:
        array: `pyarrow.Array`, lists as deep as `inner` has axes.
        spec: The input.
        inner: The shape of a row; -1: free.
        faults: Gets the rows at fault: missing, of another shape, with a value at fault.
        where: The column, for messages.

    Returns:
        One row for each that came. Where one is at fault, any values; in ragged rows, none.
    """
    uniform = _read_uniform(array, inner)
    if uniform is None:
        return _read_any(array, spec, inner, faults, where)
    leaves, shape = uniform
    cast = cast_values(leaves, spec)
    size = math.prod(shape)
    _tell(cast, faults, where, lambda place: divmod(place, size))
    return cast.values.reshape(len(array), *shape)


def _storage(array: Any) -> Any:
    while isinstance(array, pa.ExtensionArray | pa.DictionaryArray):
        is_extension = isinstance(array, pa.ExtensionArray)
        array = array.storage if is_extension else array.dictionary_decode()
    return array


def _read_uniform(array: Any, inner: tuple[int, ...]) -> tuple[Any, tuple[int, ...]] | None:
    """The values, and the shape that all rows have; None where they have not."""
    shape = []
    for allowed in inner:
        array = _storage(array)
        if array.null_count or not len(array):
            return None
        lengths = pc.list_value_length(array).to_numpy()
        size = int(lengths[0])
        if size == 0 or (allowed not in (-1, size)) or (lengths != size).any():
            return None
        shape.append(size)
        array = array.flatten()
    return array, tuple(shape)


def _read_any(
    array: Any, spec: TensorSpec, inner: tuple[int, ...], faults: Faults, where: str
) -> Array | RaggedRows:
    rows = len(array)
    mine = Faults(rows)
    shapes: Rows = np.zeros((rows, len(inner)), np.int64)
    owner: Rows = np.arange(rows)
    for axis, allowed in enumerate(inner):
        array = _storage(array)
        nulls = owner[array.is_null().to_numpy(zero_copy_only=False)]
        lengths = pc.list_value_length(array).fill_null(0).to_numpy().astype(np.int64)
        mine.add(nulls, FaultCode.MISSING, partial(_missing, where, axis))
        _check_lengths(lengths, owner, shapes[:, axis], axis, allowed, mine, where)
        owner = np.repeat(owner, lengths)
        array = array.flatten()
    cast = cast_values(array, spec)

    def place_in_row(place: int) -> tuple[int, int]:
        row = owner[place]
        return int(row), place - int(np.searchsorted(owner, row))

    _tell(cast, mine, where, place_in_row)
    faults.update(mine)
    values = cast.values[mine.ok[owner]]
    if -1 in inner:
        shapes[~mine.ok] = 0
        return RaggedRows(values, shapes)
    dense = np.zeros((rows, *inner), values.dtype)
    dense[mine.ok] = values.reshape(-1, *inner)
    return dense


def _missing(where: str, axis: int, _: int) -> str:
    return f"{where}: {'the value' if axis == 0 else 'a list in it'} is missing"


def _check_lengths(
    lengths: Rows,
    owner: Rows,
    sizes: Rows,
    axis: int,
    allowed: int,
    faults: Faults,
    where: str,
) -> None:
    """Checks one level of lists, and fills in the size of this axis for each row."""
    if allowed != -1:
        wrong = lengths != allowed
        sizes[:] = allowed
    else:
        # Written from the last list to the first: what stays is the first one's length.
        sizes[owner[::-1]] = lengths[::-1]
        wrong = (lengths != sizes[owner]) | (lengths == 0)
    places = np.flatnonzero(wrong)

    def reason(index: int) -> str:
        place = places[index]
        got = int(lengths[place])
        if allowed != -1:
            needed = f"allowed are {allowed}"
        elif got == 0:
            needed = "allowed is any number from 1"
        else:
            needed = f"the first list of this row has {int(sizes[owner[place]])}"
        return f"{where}: {got} values along axis {axis + 1}, {needed}"

    faults.add(owner[places], FaultCode.SHAPE, reason)


def _tell(
    cast: Cast, faults: Faults, where: str, place_in_row: Callable[[int], tuple[int, int]]
) -> None:
    for fault in cast.faults:
        places = [place_in_row(int(place)) for place in fault.places]

        def reason(index: int, fault: CastFault = fault, places: _Places = places) -> str:
            return f"{where}, value {places[index][1]}: {fault.reason(index)}"

        faults.add([row for row, _ in places], fault.code, reason)
