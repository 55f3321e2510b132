"""Between arrays and the plain values that JSON can carry.

Strict in one direction: a value of another kind, or one that the datatype cannot hold, is an
error, never wrapped or truncated. Floats round to the nearest value of their datatype, as every
decimal number has to. Used by the JSON codec of the protocol and by golden examples.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from itertools import chain
from typing import Any

import numpy as np

from rayprism.core.tensors import Array, Datatype, numpy_dtype
from rayprism.errors import InvalidInput

__all__ = ["array_from_values", "describe_value", "values_from_array"]

# Packing with `struct` checks the range of every value and is faster than `numpy.array(list)`,
# which on top would guess a dtype, take `true` for 1, and copy strings to a common length.
# `=` matters: in struct's native mode floats that are too large become infinite without a word.
_FORMATS = {
    Datatype.BOOL: "?",
    Datatype.UINT8: "B",
    Datatype.UINT16: "H",
    Datatype.UINT32: "I",
    Datatype.UINT64: "Q",
    Datatype.INT8: "b",
    Datatype.INT16: "h",
    Datatype.INT32: "i",
    Datatype.INT64: "q",
    Datatype.FP16: "e",
    Datatype.FP32: "f",
    Datatype.FP64: "d",
    Datatype.BF16: "f",
}
_NULL = type(None)


def _rules(datatype: Datatype) -> tuple[frozenset[type], str]:
    if datatype is Datatype.BYTES:
        return frozenset({str}), "strings"
    if datatype is Datatype.BOOL:
        return frozenset({bool}), "true and false"
    if datatype.is_float:
        return frozenset({float, int, _NULL}), "numbers, and null for NaN"
    limits = np.iinfo(numpy_dtype(datatype))
    return frozenset({int}), f"whole numbers from {limits.min} to {limits.max}"


_RULES = {datatype: _rules(datatype) for datatype in Datatype}


def array_from_values(name: str, datatype: Datatype, shape: tuple[int, ...], data: Any) -> Array:
    """An array from JSON values.

    Args:
        name: The tensor's name, for messages.
        datatype: What the values are meant to be.
        shape: The array's shape, sizes from 0; the number of values has to be its product.
        data: A flat list, or lists nested to the shape. Floats may be null (NaN). BYTES are
            strings, taken as UTF-8.

    Returns:
        A new array, writable and in row-major order.

    Raises:
        InvalidInput: Not a list, nesting that is not the shape's, a wrong count, a value of
            another kind, or one that the datatype cannot hold.
    """
    if type(data) is not list:
        raise InvalidInput(
            f"input {name!r}: data is {describe_value(data)}, "
            f"allowed is a list of {datatype} values"
        )
    flat = _unnest(name, shape, data) if data and type(data[0]) is list else data
    count = len(flat)
    expected = math.prod(shape)
    if count != expected:
        raise InvalidInput(
            f"input {name!r}: got {count} values, shape {list(shape)} needs {expected}"
        )
    kinds = set(map(type, flat))
    if not kinds <= _RULES[datatype][0]:
        raise InvalidInput(_wrong_value(name, datatype, flat))
    if datatype is Datatype.BYTES:
        array = _empty(name, shape, np.dtype(np.object_))
        array.reshape(-1)[:] = _encoded(name, flat)
        return array
    if _NULL in kinds:
        flat = [math.nan if value is None else value for value in flat]
    packed = np.dtype(np.float32) if datatype is Datatype.BF16 else numpy_dtype(datatype)
    array = _empty(name, shape, packed)
    try:
        struct.pack_into(f"={count}{_FORMATS[datatype]}", array.data, 0, *flat)
    except (struct.error, OverflowError):
        raise InvalidInput(_out_of_range(name, datatype, flat)) from None
    return _to_bf16(name, array) if datatype is Datatype.BF16 else array


def _empty(name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    try:
        return np.empty(shape, dtype)
    except (ValueError, OverflowError):
        # No element, and yet sizes or axes beyond what an array can have: [0, 2**63].
        raise InvalidInput(
            f"input {name!r}: shape {list(shape)} has sizes or axes beyond what an array can have"
        ) from None


def _unnest(name: str, shape: tuple[int, ...], data: list[Any]) -> list[Any]:
    level: list[Any] = [data]
    for axis, size in enumerate(shape):
        for part in level:
            if type(part) is not list or len(part) != size:
                got = f"{len(part)} values" if type(part) is list else describe_value(part)
                raise InvalidInput(
                    f"input {name!r}: data is nested otherwise than shape {list(shape)} says: "
                    f"got {got} at axis {axis}, allowed is a list of {size}. Data is flat, or "
                    "nested to the shape"
                )
        level = list(chain.from_iterable(level))
    if any(type(value) is list for value in level):
        raise InvalidInput(
            f"input {name!r}: data is nested deeper than shape {list(shape)}, "
            "allowed are flat data, or data nested to the shape"
        )
    return level


def _encoded(name: str, flat: Iterable[str]) -> list[bytes]:
    try:
        return [value.encode() for value in flat]
    except UnicodeEncodeError:
        raise InvalidInput(
            f"input {name!r}: a string holds half of a surrogate pair, which is not valid Unicode"
        ) from None


def _to_bf16(name: str, array: Array) -> Array:
    with np.errstate(over="ignore"):
        narrow = array.astype(numpy_dtype(Datatype.BF16))
    lost = np.isinf(narrow) & ~np.isinf(array)
    if lost.any():
        value = float(array[lost][0])
        raise InvalidInput(f"input {name!r}: {value!r} is out of range for BF16 (about ±3.39e38)")
    return narrow


def _out_of_range(name: str, datatype: Datatype, flat: list[Any]) -> str:
    if datatype.is_float:
        allowed = f"at most {_largest(datatype)} in size"
    else:
        limits = np.iinfo(numpy_dtype(datatype))
        allowed = f"{limits.min} to {limits.max}"
    for index, value in enumerate(flat):
        try:
            struct.pack(f"={_FORMATS[datatype]}", value)
        except (struct.error, OverflowError):
            return (
                f"input {name!r}: value {index} is {describe_value(value)}, out of range for "
                f"{datatype} ({allowed})"
            )
    raise AssertionError("every value fits alone, so they fit together")


def _largest(datatype: Datatype) -> str:
    return {
        Datatype.FP16: "65504",
        Datatype.BF16: "about 3.39e38",
        Datatype.FP32: "about 3.4e38",
        Datatype.FP64: "about 1.8e308",
    }[datatype]


def _wrong_value(name: str, datatype: Datatype, flat: list[Any]) -> str:
    kinds, allowed = _RULES[datatype]
    index = next(i for i, value in enumerate(flat) if type(value) not in kinds)
    return (
        f"input {name!r}: value {index} is {describe_value(flat[index])}, "
        f"allowed for {datatype} are {allowed}"
    )


def describe_value(value: Any) -> str:
    """A JSON value for an error message: its kind, and a scalar itself, cut at 40 characters."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return f"the number {value!r:.40}"
    if isinstance(value, str):
        return f"the string {value[:40]!r}"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    if isinstance(value, dict):
        return "an object"
    return type(value).__name__


def values_from_array(array: Array) -> list[Any]:
    """The values of an array, flat, in row-major order, as plain Python objects.

    BYTES come as strings. The inverse of `array_from_values`, for what JSON can hold.

    Raises:
        ValueError: A BYTES element is not UTF-8, which JSON cannot carry.
    """
    if array.dtype.kind in "OSU":
        return [_text(value) for value in array.ravel().tolist()]
    if array.dtype == numpy_dtype(Datatype.BF16):
        array = array.astype(np.float32)
    values: list[Any] = array.ravel().tolist()
    return values


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode()
    return str(value)
