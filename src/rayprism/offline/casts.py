"""From Arrow values to the values of a datatype, without losing any.

What a datatype cannot hold is a fault of its row, never wrapped or cut. The rules:

- Whole numbers fit where the datatype holds exactly that number: 16777217 does not fit FP32.
- Floats round to the nearest value of a narrower float, as every decimal number has to, unless
  that is infinite where the value was not. They fit an integer datatype where they are whole.
- Booleans count as 0 and 1, and 0 and 1 as booleans.
- Text (as in CSV) is parsed: spaces around it do not matter, whole numbers are decimal and may
  end in `.0`, floats may be `nan` and `inf`, booleans are true, false, 1 and 0.
- Decimals become the nearest float; those without a fraction may become integers.
- A missing value is a fault. Only in a column of floats (or of text that is parsed to them, where
  empty counts as missing) it becomes NaN, if the input takes NaN, as `null` does in JSON requests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayprism.core.tensors import Array, Datatype, TensorSpec, numpy_dtype
from rayprism.core.values import describe_value
from rayprism.offline.rows import FaultCode, Mask, Rows

__all__ = ["Cast", "CastFault", "cast_values", "plain_type", "why_not"]

_WHOLE = r"^[+-]?[0-9]{1,20}(\.0*)?$"
# Source: significand bits, the hidden one included, of IEEE 754 and of bfloat16. Up to two to
# this power every whole number has a place of its own.
_EXACT_BITS = {Datatype.FP16: 11, Datatype.BF16: 8, Datatype.FP32: 24, Datatype.FP64: 53}


@dataclass(frozen=True, slots=True)
class CastFault:
    """Values at fault for one reason.

    Args:
        places: Of these values, counted from 0.
        code: Of all of them.
        reason: Gets an index into `places`.
    """

    places: Rows
    code: FaultCode
    reason: Callable[[int], str]


@dataclass(slots=True)
class Cast:
    """Values of a datatype.

    Args:
        values: One for each that came; where one is at fault, any. Shape: `[values]`. May be a
            read-only view of Arrow's memory.
        faults: A value may be in more than one.
    """

    values: Array
    faults: list[CastFault] = field(default_factory=list)


def plain_type(kind: Any) -> Any:
    """The type that a column's values have, whatever it is stored as: no dictionary, extension."""
    while True:
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        elif isinstance(kind, pa.BaseExtensionType):
            kind = kind.storage_type
        else:
            return kind


def why_not(kind: Any, datatype: Datatype) -> str:
    """Why no value of an Arrow type can be cast to a datatype; empty where some can.

    Args:
        kind: Without lists around it; see `plain_type`.
        datatype: Of the input.
    """
    if pa.types.is_temporal(kind):
        return (
            "times are not cast: which unit and zone the model was trained on is not known here. "
            "Add a column that holds the number, such as the hour (pyarrow.compute.hour) or the "
            "seconds since 1970"
        )
    if pa.types.is_null(kind):
        return "it holds no value at all, only nulls"
    if _is_text(kind):
        return ""
    if _is_binary(kind):
        return "" if datatype is Datatype.BYTES else "bytes are not cast to numbers"
    if datatype is Datatype.BYTES:
        return "only text and bytes are cast to BYTES: write the column as text"
    if pa.types.is_boolean(kind) or pa.types.is_integer(kind):
        return ""
    if pa.types.is_floating(kind):
        return "floats are not cast to BOOL" if datatype is Datatype.BOOL else ""
    if pa.types.is_decimal(kind):
        if datatype.is_float or (kind.scale == 0 and datatype.is_integer):
            return ""
        return "decimals are cast to floats, and to integers where their scale is 0"
    return "allowed are numbers, booleans, text and bytes, and lists of them"


def cast_values(array: Any, spec: TensorSpec, *, as_text: bool = False) -> Cast:
    """Casts the values of an Arrow array.

    Args:
        array: `pyarrow.Array` of a type for which `why_not` has no objection.
        spec: The input; its shape does not matter here.
        as_text: Whether text stays `str` where the datatype is BYTES, for a runtime that wants it
            so. Binary values become `bytes` in any case.
    """
    if spec.datatype is Datatype.BYTES:
        plain = plain_type(array.type)
        kind = pa.large_string() if as_text and _is_text(plain) else pa.large_binary()
        return _cast_bytes(array, kind)
    array = _decode(array)
    faults: list[CastFault] = []
    fractional = pa.types.is_floating(array.type)
    if pa.types.is_decimal(array.type):
        array = array.cast(pa.float64() if spec.datatype.is_float else pa.string())
    if _is_text(array.type):
        fractional = spec.datatype.is_float
        array = _parse(array, spec.datatype, fractional and spec.allow_nan, faults)
    array, nulls = _fill_nulls(array, fractional and spec.datatype.is_float and spec.allow_nan)
    if nulls is not None:
        faults.append(CastFault(nulls, FaultCode.MISSING, lambda _: "the value is missing"))
    values = _narrow(array.to_numpy(zero_copy_only=False), spec.datatype, faults)
    if not spec.allow_nan and spec.datatype.is_float:
        _refuse_nan(values, faults)
    return Cast(values, faults)


def _is_text(kind: Any) -> bool:
    types = pa.types
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _is_binary(kind: Any) -> bool:
    types = pa.types
    return bool(
        types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_binary_view(kind)
        or types.is_fixed_size_binary(kind)
    )


def _decode(array: Any) -> Any:
    while True:
        if isinstance(array, pa.ExtensionArray):
            array = array.storage
        elif isinstance(array, pa.DictionaryArray):
            array = array.dictionary_decode()
        else:
            return array


def _cast_bytes(array: Any, kind: Any) -> Cast:
    # Few values many times is what text columns of tables are; one object for each of them is
    # made faster, and takes less memory, than one for each row.
    if isinstance(array, pa.DictionaryArray) and not array.dictionary.null_count:
        encoded = pa.DictionaryArray.from_arrays(
            array.indices, _decode(array.dictionary).cast(kind)
        )
    else:
        encoded = _decode(array).cast(kind).dictionary_encode()
    faults: list[CastFault] = []
    if encoded.null_count:
        nulls = np.flatnonzero(encoded.is_null().to_numpy(zero_copy_only=False))
        faults.append(CastFault(nulls, FaultCode.MISSING, lambda _: "the value is missing"))
        encoded = pa.DictionaryArray.from_arrays(
            encoded.indices.fill_null(len(encoded.dictionary)),
            pa.concat_arrays([encoded.dictionary, pa.array([b""]).cast(kind)]),
        )
    distinct: Array = encoded.dictionary.to_numpy(zero_copy_only=False)
    return Cast(distinct[encoded.indices.to_numpy()], faults)


def _fill_nulls(array: Any, as_nan: bool) -> tuple[Any, Rows | None]:
    if not array.null_count:
        return array, None
    if as_nan:
        return array.fill_null(pa.scalar(float("nan"), array.type)), None
    nulls = np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))
    return array.fill_null(pa.scalar(0, pa.int8()).cast(array.type)), nulls


def _parse(text: Any, datatype: Datatype, empty_is_nan: bool, faults: list[CastFault]) -> Any:
    """Numbers or booleans out of text; where it is none, a fault and 0."""
    if pa.types.is_string_view(text.type):
        text = text.cast(pa.large_string())
    parsed_as = _parsed_as(datatype)
    parsed = None if _may_be_hexadecimal(text, datatype) else _try_cast(text, parsed_as)
    if parsed is None:
        parsed = _parse_trimmed(text, datatype, empty_is_nan, faults)
    if datatype.is_float:
        _refuse_overflow(parsed, text, datatype, faults)
    return parsed


def _parsed_as(datatype: Datatype) -> Any:
    if datatype is Datatype.BOOL:
        return pa.bool_()
    if datatype.is_integer:
        return pa.from_numpy_dtype(numpy_dtype(datatype))
    return pa.float64() if datatype is Datatype.FP64 else pa.float32()


def _may_be_hexadecimal(text: Any, datatype: Datatype) -> bool:
    # Arrow takes 0xFF for 255 where it parses integers, and 0xFFFFFFFFFFFFFFFF for -1.
    return datatype.is_integer and bool(
        pc.any(pc.match_substring(text, "x", ignore_case=True)).as_py()
    )


def _try_cast(text: Any, kind: Any) -> Any:
    try:
        return text.cast(kind)
    except pa.ArrowInvalid:
        return None


def _parse_trimmed(
    text: Any, datatype: Datatype, empty_is_nan: bool, faults: list[CastFault]
) -> Any:
    trimmed = pc.utf8_trim_whitespace(text)
    empty = pc.equal(pc.utf8_length(trimmed), 0)
    if datatype.is_integer:
        # What is no whole number becomes empty, and so is not parsed; Arrow knows no plus sign, and
        # no minus before the zero of an unsigned number.
        whole = pc.match_substring_regex(trimmed, _WHOLE)
        wrong = pc.and_(pc.invert(whole), pc.invert(empty))
        trimmed = pc.replace_substring_regex(trimmed, r"^\+|\.0*$", "")
        trimmed = pc.replace_substring_regex(trimmed, r"^-(0+)$", r"\1")
        trimmed = pc.if_else(whole, trimmed, pa.scalar(None, trimmed.type))
        _refuse_text(text, np.flatnonzero(_mask(wrong)), datatype, faults)
    else:
        trimmed = pc.if_else(empty, pa.scalar(None, trimmed.type), trimmed)
    if not empty_is_nan:
        nothing = np.flatnonzero(_mask(empty))
        if len(nothing):
            faults.append(CastFault(nothing, FaultCode.MISSING, lambda _: "the text is empty"))
    parts: list[Any] = []
    wrong_places: list[int] = []
    _parse_parts(trimmed, 0, _parsed_as(datatype), parts, wrong_places)
    _refuse_text(text, np.array(wrong_places, np.int64), datatype, faults)
    parsed = pa.concat_arrays(parts)
    if empty_is_nan:
        return parsed
    # Nulls that came are still null, and told as such; what was refused here is not, a second time.
    refused = pc.and_(parsed.is_null(), text.is_valid())
    return pc.if_else(refused, pa.scalar(0, pa.int8()).cast(parsed.type), parsed)


def _parse_parts(
    text: Any, start: int, kind: Any, parts: list[Any], wrong_places: list[int]
) -> None:
    """Parses what can be parsed, halving what cannot until the texts at fault are alone."""
    parsed = _try_cast(text, kind)
    if parsed is not None:
        parts.append(parsed)
    elif len(text) == 1:
        wrong_places.append(start)
        parts.append(pa.array([0], pa.int8()).cast(kind))
    else:
        half = len(text) // 2
        _parse_parts(text[:half], start, kind, parts, wrong_places)
        _parse_parts(text[half:], start + half, kind, parts, wrong_places)


def _mask(array: Any) -> Mask:
    mask: Mask = array.fill_null(False).to_numpy(zero_copy_only=False)
    return mask


def _refuse_text(text: Any, places: Rows, datatype: Datatype, faults: list[CastFault]) -> None:
    if not len(places):
        return
    if datatype is Datatype.BOOL:
        allowed = "true, false, 1 and 0"
    elif datatype.is_integer:
        allowed = f"whole numbers {_range(datatype)}"
    else:
        allowed = "numbers, nan and inf"

    def reason(index: int) -> str:
        got = describe_value(text[int(places[index])].as_py())
        return f"got {got}, allowed for {datatype} are {allowed}"

    faults.append(CastFault(places, FaultCode.VALUE, reason))


def _refuse_overflow(parsed: Any, text: Any, datatype: Datatype, faults: list[CastFault]) -> None:
    endless = _mask(pc.is_inf(parsed))
    if endless.any():
        told = _mask(pc.match_substring(text, "inf", ignore_case=True))
        places = np.flatnonzero(endless & ~told)
        _refuse_range(places, lambda place: text[place].as_py(), datatype, faults)


def _narrow(values: Array, datatype: Datatype, faults: list[CastFault]) -> Array:
    """Numbers and booleans to the dtype of a datatype."""
    target = numpy_dtype(datatype)
    if values.dtype == target:
        return values
    kind = values.dtype.kind
    if kind == "b":
        return values.astype(target)
    narrow: Array
    bad: Mask | None
    if datatype is Datatype.BOOL:
        narrow, bad = values == 1, (values != 1) & (values != 0)
    elif kind == "f":
        narrow, bad = _from_floats(values, datatype)
    elif datatype.is_float:
        narrow, bad = _exact_floats(values, datatype)
    else:
        narrow, bad = _other_integers(values, target)
    if bad is not None and bad.any():
        places = np.flatnonzero(bad)
        _refuse_range(places, lambda place: values[place].item(), datatype, faults)
    return narrow


def _other_integers(values: Array, target: np.dtype[Any]) -> tuple[Array, Mask | None]:
    have, limits = np.iinfo(values.dtype), np.iinfo(target)
    if limits.min <= have.min and have.max <= limits.max:
        return values.astype(target), None
    bad = np.zeros(len(values), np.bool_)
    if have.min < limits.min:
        bad |= values < values.dtype.type(limits.min)
    if have.max > limits.max:
        bad |= values > values.dtype.type(limits.max)
    return values.astype(target), bad


def _exact_floats(values: Array, datatype: Datatype) -> tuple[Array, Mask | None]:
    most = 2 ** _EXACT_BITS[datatype]
    have = np.iinfo(values.dtype)
    with np.errstate(over="ignore"):
        floats = values.astype(numpy_dtype(datatype))
    small = -most <= have.min and have.max <= most
    if small or not len(values) or (values.min() >= -most and values.max() <= most):
        return floats, None
    # Back in float64, which holds each of these floats, and has a place for the bounds, which
    # are powers of two.
    wide = floats.astype(np.float64)
    fits = (wide >= float(have.min)) & (wide < float(int(have.max) + 1))
    back = np.where(fits, wide, 0.0).astype(values.dtype)
    return floats, ~fits | (back != values)


def _from_floats(values: Array, datatype: Datatype) -> tuple[Array, Mask | None]:
    target = numpy_dtype(datatype)
    if datatype.is_float:
        with np.errstate(over="ignore", invalid="ignore"):
            floats = values.astype(target)
            endless = np.isinf(floats)
        return floats, endless & ~np.isinf(values) if endless.any() else None
    limits = np.iinfo(target)
    wide = values.astype(np.float64)
    fits = (wide >= float(limits.min)) & (wide < float(int(limits.max) + 1))
    fits &= np.trunc(wide) == wide
    return np.where(fits, wide, 0.0).astype(target), ~fits


def _refuse_range(
    places: Rows, value: Callable[[int], Any], datatype: Datatype, faults: list[CastFault]
) -> None:
    if not len(places):
        return

    def reason(index: int) -> str:
        got = describe_value(value(int(places[index])))
        return f"got {got}, which {datatype} cannot hold ({_range(datatype)})"

    faults.append(CastFault(places, FaultCode.RANGE, reason))


def _range(datatype: Datatype) -> str:
    if datatype is Datatype.BOOL:
        return "0 and 1"
    if datatype.is_integer:
        limits = np.iinfo(numpy_dtype(datatype))
        return f"from {limits.min} to {limits.max}"
    largest = {
        Datatype.FP16: "65504",
        Datatype.BF16: "3.39e38",
        Datatype.FP32: "3.4e38",
        Datatype.FP64: "1.8e308",
    }[datatype]
    return f"up to {largest} in size; whole numbers exactly"


def _refuse_nan(values: Array, faults: list[CastFault]) -> None:
    if values.dtype.kind == "f" and len(values):
        # A minimum is NaN where any element is; see rayprism.core.tensors.
        least = np.minimum.reduce(values)
        if least == least:
            return
    with np.errstate(invalid="ignore"):
        places = np.flatnonzero(np.isnan(values))
    if len(places):
        faults.append(
            CastFault(places, FaultCode.NAN, lambda _: "NaN, which this model does not take")
        )
