"""Makes tables of the lines of JSON Lines files.

The type of a column is decided once, from samples of the input: a batch that happens to hold whole
numbers only has the same type as the next one. A value that its type cannot hold exactly is a
fault of its row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce
from itertools import chain
from types import NoneType
from typing import Any

import numpy as np
import orjson
import pyarrow as pa

from rayprism.offline.lines import BadRow, Integers, Lines, RowBatch

__all__ = ["JsonParser", "json_type", "merge_json_types", "parse_objects", "plain_json_type"]

_INT64 = range(-(2**63), 2**63)
_PLAIN: dict[pa.DataType, frozenset[type]] = {
    pa.bool_(): frozenset({bool}),
    pa.int64(): frozenset({int}),
    pa.float64(): frozenset({int, float}),
    pa.string(): frozenset({str}),
}


def parse_objects(lines: Lines) -> tuple[list[dict[str, Any]], Integers, list[BadRow]]:
    """The objects of lines, the byte offset of each, and the lines that hold none."""
    objects: list[dict[str, Any]] = []
    kept: list[int] = []
    bad = list(lines.bad)
    bounds = zip(
        lines.starts.tolist(), lines.stops().tolist(), lines.positions.tolist(), strict=True
    )
    for start, stop, position in bounds:
        line = lines.data[start:stop]
        try:
            value = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            if line.strip():
                bad.append(BadRow(position, _why(line, error)))
            continue
        if type(value) is dict:
            objects.append(value)
            kept.append(position)
        else:
            bad.append(BadRow(position, f"the line is {_name(value)}, not an object"))
    return objects, np.array(kept, np.int64), bad


def _why(line: bytes, error: orjson.JSONDecodeError) -> str:
    try:
        line.decode()
    except UnicodeDecodeError:
        return "not UTF-8"
    return f"not JSON: {error.msg} at character {error.pos + 1}"


def json_type(values: Iterable[Any]) -> pa.DataType:
    """The type that holds these values: text where they are mixed, or objects; null for none."""
    return reduce(merge_json_types, map(_type_of, values), pa.null())


def _type_of(value: Any) -> pa.DataType:
    match value:
        case None:
            return pa.null()
        case bool():
            return pa.bool_()
        case int():
            return pa.int64() if value in _INT64 else pa.string()
        case float():
            return pa.float64()
        case list():
            return pa.list_(json_type(value))
        case _:
            return pa.string()


def merge_json_types(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    """The type for values of two types: text where no other holds both."""
    if one == other or pa.types.is_null(other):
        return one
    if pa.types.is_null(one):
        return other
    if {one, other} == {pa.int64(), pa.float64()}:
        return pa.float64()
    if pa.types.is_list(one) and pa.types.is_list(other):
        return pa.list_(merge_json_types(one.value_type, other.value_type))
    return pa.string()


def plain_json_type(type_: pa.DataType) -> pa.DataType:
    """The nearest type that JSON values are read as: whole numbers, numbers, booleans or text."""
    if pa.types.is_boolean(type_):
        return pa.bool_()
    if pa.types.is_integer(type_):
        return pa.int64()
    if pa.types.is_floating(type_):
        return pa.float64()
    if pa.types.is_list(type_) or pa.types.is_large_list(type_):
        return pa.list_(plain_json_type(type_.value_type))
    if pa.types.is_fixed_size_list(type_):
        return pa.list_(plain_json_type(type_.value_type))
    return pa.string()


class JsonParser:
    """Makes tables of the lines of a JSON Lines file.

    A key that a line does not have is a null.

    Args:
        fields: What to take of each object, and the types, as `plain_json_type` gives them.
    """

    def __init__(self, fields: Sequence[pa.Field]) -> None:
        self._fields = fields

    def parse(self, lines: Lines) -> RowBatch:
        """Parses lines; each alone decides what becomes of it."""
        objects, positions, bad = parse_objects(lines)
        faults: dict[int, str] = {}
        columns = {}
        for field in self._fields:
            values = [row.get(field.name) for row in objects]
            columns[field.name] = _array(values, field, faults)
        table = pa.table(columns)
        if faults:
            keep = np.ones(len(objects), np.bool_)
            keep[list(faults)] = False
            table = table.filter(pa.array(keep)) if columns else table
            bad += [BadRow(int(positions[row]), reason) for row, reason in faults.items()]
            positions = positions[keep]
        bad.sort(key=lambda row: row.position)
        return RowBatch(table, positions, bad)


def _array(values: list[Any], field: pa.Field, faults: dict[int, str]) -> pa.Array:
    if _is_plain(values, field.type):
        try:
            return pa.array(values, field.type)
        except (OverflowError, pa.ArrowException):
            # Of a value that is too large for the type: found below.
            pass
    held = []
    for row, value in enumerate(values):
        try:
            held.append(_hold(value, field.type))
        except ValueError as error:
            held.append(None)
            faults.setdefault(row, f"column {field.name!r}: {error}")
    return pa.array(held, field.type)


def _is_plain(values: Iterable[Any], type_: pa.DataType) -> bool:
    """Whether Arrow takes these values as they are; it would cut 1.5 to 1, and take true for 1."""
    kinds = {type(value) for value in values} - {NoneType}
    if pa.types.is_list(type_):
        lists = (value for value in values if value is not None)
        return kinds <= {list} and _is_plain(list(chain.from_iterable(lists)), type_.value_type)
    return kinds <= _PLAIN[type_]


def _hold(value: Any, type_: pa.DataType) -> Any:
    """A value as its type has it; ValueError where the type cannot hold it exactly."""
    if value is None:
        return None
    if pa.types.is_string(type_):
        return value if type(value) is str else orjson.dumps(value).decode()
    if pa.types.is_list(type_) and type(value) is list:
        return [_hold(item, type_.value_type) for item in value]
    whole = type(value) is int or (type(value) is float and value.is_integer())
    if pa.types.is_integer(type_) and whole and int(value) in _INT64:
        return int(value)
    if pa.types.is_floating(type_):
        if type(value) is float:
            return value
        if type(value) is int and int(float(value)) == value:
            return float(value)
    if pa.types.is_boolean(type_) and type(value) is bool:
        return value
    raise ValueError(f"{_name(value)}, where the input has {type_}")


def _name(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int():
            return "a whole number" if value in _INT64 else "a number beyond 64 bits"
        case float():
            return "a number with a fraction"
        case str():
            return "text"
        case list():
            return "a list"
        case _:
            return "an object"
