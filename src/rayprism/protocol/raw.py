"""Tensors as raw bytes: the binary tensor data of HTTP, and the raw contents of gRPC.

Elements lie in row-major order without gaps, little-endian; a BOOL is one byte, 0 or 1; an element
of BYTES is its length as four bytes, little-endian, and then that many bytes.

Source: Triton's binary tensor data extension; gRPC's `raw_input_contents` are the same.
"""

from __future__ import annotations

import struct
import sys
from typing import Any

import numpy as np

from rayprism.core.tensors import Array, Datatype, datatype_of, item_size_bytes, numpy_dtype
from rayprism.errors import InvalidInput, ModelFailed
from rayprism.protocol.fields import check_count

__all__ = ["array_from_raw", "output_array", "output_elements", "raw_from_array"]

if sys.byteorder != "little":
    raise ImportError("rayprism needs a little-endian machine: tensors are taken as they come")

_pack_length = struct.Struct("<I").pack
_unpack_length = struct.Struct("<I").unpack_from


def array_from_raw(
    name: str,
    datatype: Datatype,
    shape: tuple[int, ...],
    raw: bytes | memoryview,
    start: int,
    stop: int,
) -> Array:
    """An array over raw bytes.

    It is a read-only view of `raw`, not a copy, except for BYTES and where its first element does
    not lie at a multiple of its size: native code may not read from there.

    Args:
        name: The tensor's name, for messages.
        datatype: Of its elements.
        shape: Checked sizes.
        raw: The buffer that holds the tensor; `start` and `stop` lie inside.
        start: Its first byte.
        stop: Behind its last byte.

    Raises:
        InvalidInput: Too few or too many bytes for the shape, BOOL bytes other than 0 and 1, or
            elements of BYTES that end outside.
    """
    count = check_count(f"input {name!r}", shape)
    if datatype is Datatype.BYTES:
        elements = _bytes_elements(name, shape, count, raw, start, stop)
        array = np.empty(shape, np.object_)
        array.reshape(-1)[:] = elements
        return array
    width = item_size_bytes(datatype) or 1
    if stop - start != count * width:
        raise InvalidInput(
            f"input {name!r}: got {stop - start} bytes, {datatype} of shape {list(shape)} "
            f"needs {count * width}"
        )
    if count == 0:
        return np.empty(shape, numpy_dtype(datatype))
    if datatype is Datatype.BOOL:
        wrong = np.frombuffer(raw, np.uint8, count, start) > 1
        if wrong.any():
            index = int(wrong.argmax())
            raise InvalidInput(
                f"input {name!r}: byte {index} is {raw[start + index]}, "
                "allowed for BOOL are 0 and 1"
            )
    array = np.frombuffer(raw, numpy_dtype(datatype), count, start)
    if not array.flags.aligned:
        array = array.copy()
    return array.reshape(shape)


def _bytes_elements(
    name: str, shape: tuple[int, ...], count: int, raw: bytes | memoryview, start: int, stop: int
) -> list[bytes]:
    if count * 4 > stop - start:
        raise InvalidInput(
            f"input {name!r}: got {stop - start} bytes, BYTES of shape {list(shape)} needs at "
            f"least {count * 4}"
        )
    if type(raw) is not bytes:
        raw, start, stop = bytes(raw[start:stop]), 0, stop - start
    elements = []
    position = start
    for index in range(count):
        first = position + 4
        # Without this the length could be read from bytes of the next tensor.
        if first > stop:
            raise InvalidInput(
                f"input {name!r}: element {index} of BYTES: {stop - position} bytes are left, "
                "its length needs 4"
            )
        position = first + _unpack_length(raw, position)[0]
        if position > stop:
            raise InvalidInput(
                f"input {name!r}: element {index} of BYTES says it has {position - first} bytes, "
                f"{stop - first} are left"
            )
        elements.append(raw[first:position])
    if position != stop:
        raise InvalidInput(
            f"input {name!r}: {stop - position} bytes are left over behind the {count} elements "
            f"that shape {list(shape)} needs"
        )
    return elements


def output_array(name: str, array: Array) -> tuple[Datatype, Array]:
    """The datatype of an output, and the array in row-major order and native byte order.

    Raises:
        ModelFailed: The model returned a dtype that the protocol does not have.
    """
    try:
        datatype = datatype_of(array)
    except ValueError:
        try:
            array = array.astype(array.dtype.newbyteorder("="))
            datatype = datatype_of(array)
        except ValueError:
            raise ModelFailed(
                f"the model returned output {name!r} as {array.dtype}, "
                "which the protocol does not have"
            ) from None
    # `ascontiguousarray` would turn a scalar into a list of one.
    return datatype, array if array.flags.c_contiguous else array.copy("C")


def raw_from_array(name: str, datatype: Datatype, array: Array) -> bytes:
    """The raw bytes of an output, as `output_array` made it.

    Raises:
        ModelFailed: As `output_elements`, or an element of BYTES is too long for its length.
    """
    if datatype is not Datatype.BYTES:
        return array.tobytes()
    elements = output_elements(name, array)
    parts: list[Any] = [b""] * (2 * len(elements))
    try:
        parts[0::2] = map(_pack_length, map(len, elements))
    except struct.error:
        raise ModelFailed(
            f"the model returned output {name!r} with an element of 4 GiB or more"
        ) from None
    parts[1::2] = elements
    return b"".join(parts)


def output_elements(name: str, array: Array) -> list[bytes]:
    """The elements of a BYTES output, in row-major order; strings as UTF-8.

    Raises:
        ModelFailed: One is neither bytes nor a string, or a string is not valid Unicode.
    """
    elements: list[Any] = array.ravel().tolist()
    if set(map(type, elements)) <= {bytes}:
        return elements
    try:
        return [_element(value) for value in elements]
    except (TypeError, UnicodeEncodeError) as error:
        raise ModelFailed(
            f"the model returned output {name!r} with an element that BYTES cannot hold: {error}"
        ) from None


def _element(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return value.encode()
    raise TypeError(f"{type(value).__name__} is neither bytes nor a string")
