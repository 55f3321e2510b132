"""Between arrays and the plain values that JSON can carry.

Strict in one direction: a value that the datatype cannot hold is an error, never rounded, wrapped
or truncated. Used by the JSON codec of the protocol and by golden examples.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from rayprism.core.tensors import Array, Datatype, numpy_dtype
from rayprism.errors import InvalidInput

__all__ = ["array_from_values", "values_from_array"]


def array_from_values(name: str, datatype: Datatype, shape: tuple[int, ...], data: Any) -> Array:
    """An array from JSON values.

    Args:
        name: The tensor's name, for messages.
        datatype: What the values are meant to be.
        shape: The array's shape; the number of values has to be its product.
        data: A flat list, or lists nested to the shape. Floats may be null (NaN). BYTES are
            strings, taken as UTF-8.

    Raises:
        InvalidInput: Not a list, ragged nesting, a wrong count, a value of another kind, or one
            that the datatype cannot hold.
    """
    if type(data) is not list:
        raise InvalidInput(
            f"input {name!r}: data is {_kind(data)}, allowed is a list of {datatype} values"
        )
    if datatype is Datatype.BYTES:
        return _bytes_from_values(name, shape, data)
    try:
        raw = np.array(data)
    except ValueError:
        raise InvalidInput(f"input {name!r}: data is nested unevenly") from None
    kind = raw.dtype.kind
    if raw.size == 0:
        converted = np.empty(raw.shape, numpy_dtype(datatype))
    elif datatype.is_float:
        converted = _floats(name, datatype, raw, kind)
    elif datatype is Datatype.BOOL:
        if kind != "b":
            raise InvalidInput(_wrong_value(name, datatype, data, "true or false"))
        converted = raw
    else:
        converted = _integers(name, datatype, raw, kind, data)
    if converted.ndim != 1 and converted.shape != shape:
        raise InvalidInput(
            f"input {name!r}: data is nested as {list(converted.shape)}, shape says {list(shape)}"
        )
    return _reshape(name, converted, shape)


def _reshape(name: str, array: Array, shape: tuple[int, ...]) -> Array:
    expected = math.prod(shape)
    if array.size != expected:
        raise InvalidInput(
            f"input {name!r}: got {array.size} values, shape {list(shape)} needs {expected}"
        )
    return array if array.shape == shape else array.reshape(shape)


def _floats(name: str, datatype: Datatype, raw: Array, kind: str) -> Array:
    if kind == "O":
        flat = raw.ravel().tolist()
        wrong = next(
            (v for v in flat if v is not None and (isinstance(v, bool) or not _is_number(v))), None
        )
        if wrong is not None:
            raise InvalidInput(_wrong_value(name, datatype, wrong, "numbers, and null for NaN"))
        raw = np.array([math.nan if v is None else v for v in flat], float).reshape(raw.shape)
    elif kind not in "fiu":
        raise InvalidInput(
            _wrong_value(name, datatype, raw.ravel().tolist(), "numbers, and null for NaN")
        )
    target = numpy_dtype(datatype)
    if datatype is Datatype.FP64:
        return raw.astype(target)
    try:
        with np.errstate(over="raise"):
            converted = raw.astype(target)
    except FloatingPointError:
        raise InvalidInput(f"input {name!r}: a value is out of range for {datatype}") from None
    if datatype is Datatype.BF16 and np.isinf(converted).any() and not np.isinf(raw).any():
        raise InvalidInput(f"input {name!r}: a value is out of range for {datatype}")
    return converted


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


def _integers(name: str, datatype: Datatype, raw: Array, kind: str, data: Any) -> Array:
    if kind == "O" or (kind == "f" and _all_ints(data)):
        # numpy has no common type for, say, -1 and 2**63; out of range for one or the other.
        raise InvalidInput(_integer_range(name, datatype, data))
    if kind not in "iu":
        raise InvalidInput(_wrong_value(name, datatype, data, "whole numbers"))
    target = numpy_dtype(datatype)
    if raw.dtype != target:
        limits = np.iinfo(target)
        if int(raw.min()) < limits.min or int(raw.max()) > limits.max:
            raise InvalidInput(_integer_range(name, datatype, data))
        raw = raw.astype(target)
    return raw


def _integer_range(name: str, datatype: Datatype, data: Any) -> str:
    limits = np.iinfo(numpy_dtype(datatype))
    for value in _flatten(data):
        if type(value) is not int:
            return _wrong_value(name, datatype, value, "whole numbers")
        if not limits.min <= value <= limits.max:
            return (
                f"input {name!r}: {value} is out of range for {datatype} "
                f"({limits.min} to {limits.max})"
            )
    return f"input {name!r}: a value is out of range for {datatype}"


def _all_ints(data: Any) -> bool:
    return all(type(value) is int for value in _flatten(data))


def _bytes_from_values(name: str, shape: tuple[int, ...], data: list[Any]) -> Array:
    flat = _flatten(data) if data and type(data[0]) is list else data
    array = np.empty(len(flat), object)
    for index, value in enumerate(flat):
        if type(value) is not str:
            raise InvalidInput(_wrong_value(name, Datatype.BYTES, value, "strings"))
        try:
            array[index] = value.encode()
        except UnicodeEncodeError:
            raise InvalidInput(f"input {name!r}: a string is not valid Unicode") from None
    return _reshape(name, array, shape)


def _flatten(data: Any) -> list[Any]:
    flat: list[Any] = []
    stack = [data]
    while stack:
        item = stack.pop()
        if type(item) is list:
            stack.extend(reversed(item))
        else:
            flat.append(item)
    return flat


def _wrong_value(name: str, datatype: Datatype, value: Any, allowed: str) -> str:
    for item in _flatten(value):
        if allowed.startswith("numbers") and item is not None and _odd(item, (int, float)):
            value = item
            break
        if allowed.startswith("whole") and _odd(item, (int,)):
            value = item
            break
        if allowed.startswith("true") and type(item) is not bool:
            value = item
            break
    return f"input {name!r}: got {_kind(value)}, allowed for {datatype} are {allowed}"


def _odd(item: Any, kinds: tuple[type, ...]) -> bool:
    return isinstance(item, bool) or not isinstance(item, kinds)


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return f"the number {value!r:.40}"
    if isinstance(value, str):
        return f"the string {value[:40]!r}"
    if isinstance(value, list):
        return "a list"
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
