"""Which type holds the values of two columns of Parquet files, and loses none."""

from __future__ import annotations

import pyarrow as pa

__all__ = ["common_type"]

_FLOATS = {16: pa.float16(), 32: pa.float32(), 64: pa.float64()}
_SIGNED = {8: pa.int8(), 16: pa.int16(), 32: pa.int32(), 64: pa.int64()}
_UNSIGNED = {8: pa.uint8(), 16: pa.uint16(), 32: pa.uint32(), 64: pa.uint64()}
_UNITS = ("s", "ms", "us", "ns")


def common_type(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """The type that holds what either holds; None where there is none."""
    if one == other or pa.types.is_null(other):
        return one
    if pa.types.is_null(one):
        return other
    if pa.types.is_dictionary(one):
        return common_type(one.value_type, other)
    if pa.types.is_dictionary(other):
        return common_type(one, other.value_type)
    for find in (_number, _text, _time, _list):
        found = find(one, other)
        if found is not None:
            return found
    return None


def _number(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    one_whole, other_whole = pa.types.is_integer(one), pa.types.is_integer(other)
    if one_whole and other_whole:
        signs = {pa.types.is_signed_integer(one), pa.types.is_signed_integer(other)}
        if len(signs) == 1:
            return (_SIGNED if signs == {True} else _UNSIGNED)[max(one.bit_width, other.bit_width)]
        signed, unsigned = (one, other) if pa.types.is_signed_integer(one) else (other, one)
        return _SIGNED.get(max(signed.bit_width, 2 * unsigned.bit_width))
    if pa.types.is_floating(one) and pa.types.is_floating(other):
        return _FLOATS[max(one.bit_width, other.bit_width)]
    if one_whole and pa.types.is_floating(other):
        # A float holds whole numbers of up to half its bits: 11, 24 and 53 bits of fraction.
        return _FLOATS.get(max(2 * one.bit_width, other.bit_width))
    if other_whole and pa.types.is_floating(one):
        return _number(other, one)
    return None


def _text(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    kinds = {one, other}
    if kinds <= {pa.string(), pa.large_string(), pa.string_view()}:
        return pa.large_string()
    if kinds <= {pa.binary(), pa.large_binary(), pa.binary_view()}:
        return pa.large_binary()
    return None


def _time(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    if pa.types.is_timestamp(one) and pa.types.is_timestamp(other) and one.tz == other.tz:
        return pa.timestamp(max(one.unit, other.unit, key=_UNITS.index), one.tz)
    return None


def _list(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    if not (_is_list(one) and _is_list(other)):
        return None
    item = common_type(one.value_type, other.value_type)
    if item is None:
        return None
    both_fixed = pa.types.is_fixed_size_list(one) and pa.types.is_fixed_size_list(other)
    if both_fixed and one.list_size == other.list_size:
        return pa.list_(item, one.list_size)
    return pa.large_list(item)


def _is_list(type_: pa.DataType) -> bool:
    return bool(
        pa.types.is_list(type_)
        or pa.types.is_large_list(type_)
        or pa.types.is_fixed_size_list(type_)
    )
