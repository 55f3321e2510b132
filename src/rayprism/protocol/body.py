"""A request or an answer over HTTP as bytes: JSON, and binary tensor data behind it.

Source: Open Inference Protocol v2, "HTTP/REST"; Triton's binary tensor data extension.
"""

from __future__ import annotations

import json
from typing import Any, Literal

import orjson

from rayprism.core.tensors import Tensors
from rayprism.core.values import array_from_values, describe_value
from rayprism.errors import InvalidInput
from rayprism.protocol.fields import (
    MAX_TENSORS,
    check_count,
    check_name,
    check_shape,
    parse_datatype,
    refuse_shared_memory,
)
from rayprism.protocol.raw import array_from_raw

__all__ = ["LENGTH_HEADER", "check_object", "decode_tensors", "parse_body"]

LENGTH_HEADER = "Inference-Header-Content-Length"
"""Says how many bytes of JSON come before the binary tensors."""


def parse_body(body: bytes | memoryview, header_length: int | None) -> dict[str, Any]:
    """The JSON object that a body is, or that stands before its binary tensors.

    Args:
        body: The whole body, already decompressed.
        header_length: The bytes of JSON; None where all is JSON.

    Raises:
        InvalidInput: The length is not within the body, the JSON is malformed, or is no object.
    """
    if header_length is None:
        document = _parse_json(body, whole=True)
    elif not 0 < header_length <= len(body):
        raise InvalidInput(
            f"header {LENGTH_HEADER} is {header_length}, allowed is the length of the JSON, "
            f"1 to {len(body)} in a body of {len(body)} bytes"
        )
    else:
        document = _parse_json(memoryview(body)[:header_length], whole=False)
    if type(document) is not dict:
        raise InvalidInput(f"the body is {describe_value(document)}, allowed is a JSON object")
    return document


def _parse_json(text: bytes | memoryview, *, whole: bool) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        pass
    if not text:
        raise InvalidInput("the body is empty, allowed is a JSON object")
    # Python's own parser also takes NaN and Infinity, which Python clients send.
    hint = f". Binary tensors behind JSON need the header {LENGTH_HEADER}" if whole else ""
    try:
        return json.loads(bytes(text).decode())
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            hint = ""
        raise InvalidInput(
            f"the JSON is malformed: {error.msg} at line {error.lineno} column {error.colno} "
            f"(character {error.pos}){hint}"
        ) from None
    except UnicodeDecodeError as error:
        raise InvalidInput(
            f"the JSON is malformed: byte {error.start} is not UTF-8 ({error.reason}){hint}"
        ) from None
    except RecursionError:
        raise InvalidInput("the JSON is malformed: it is nested too deeply") from None
    except ValueError:
        raise InvalidInput("the JSON is malformed: a number has too many digits") from None


def check_object(where: str, value: Any) -> dict[str, Any]:
    """A value that has to be an object.

    Raises:
        InvalidInput: It is none.
    """
    if type(value) is not dict:
        raise InvalidInput(f"{where} is {describe_value(value)}, allowed is an object")
    return value


def decode_tensors(
    field: Literal["inputs", "outputs"],
    items: list[Any],
    body: bytes | memoryview,
    header_length: int | None,
) -> Tensors:
    """The tensors that a request or an answer lists, in their order.

    Binary ones are read-only views of `body` where they can be: see
    `rayprism.protocol.raw.array_from_raw`. Both kinds may be mixed. A null among floats is NaN.

    Args:
        field: Where the list was found.
        items: The list.
        body: The whole body.
        header_length: Where its binary tensors begin; None where it has none.

    Raises:
        InvalidInput: A tensor is malformed, or bytes of the body are left over.
        Unsupported: A tensor lies in shared memory.
    """
    if len(items) > MAX_TENSORS:
        raise InvalidInput(f"{field} has {len(items)} items, allowed are at most {MAX_TENSORS}")
    tensors: Tensors = {}
    position = header_length
    for index, item in enumerate(items):
        where = f"{field}[{index}]"
        if type(item) is not dict:
            raise InvalidInput(f"{where} is {describe_value(item)}, allowed is an object")
        name = check_name(where, item.get("name"), tensors)
        datatype = parse_datatype(where, item.get("datatype"))
        shape = check_shape(where, item.get("shape"))
        size_bytes = None
        parameters = item.get("parameters")
        if parameters is not None:
            refuse_shared_memory(where, check_object(f"{where}.parameters", parameters))
            size_bytes = parameters.get("binary_data_size")
        if size_bytes is not None:
            position = _check_binary(where, item, size_bytes, position, len(body))
            tensors[name] = array_from_raw(
                name, datatype, shape, body, position - size_bytes, position
            )
        elif "data" in item:
            check_count(where, shape)
            tensors[name] = array_from_values(name, datatype, shape, item["data"])
        else:
            raise InvalidInput(
                f"{where}.data is missing, allowed is a list, or parameters.binary_data_size "
                "with binary tensor data behind the JSON"
            )
    if position is not None and position != len(body):
        raise InvalidInput(
            f"{len(body) - position} bytes are left over behind the {field}' binary tensors: "
            "the sum of their parameters.binary_data_size has to be the rest of the body"
        )
    return tensors


def _check_binary(
    where: str, item: dict[str, Any], size_bytes: Any, position: int | None, body_bytes: int
) -> int:
    field = f"{where}.parameters.binary_data_size"
    if type(size_bytes) is not int or size_bytes < 0:
        raise InvalidInput(
            f"{field} is {describe_value(size_bytes)}, allowed is a whole number from 0"
        )
    if "data" in item:
        raise InvalidInput(f"{where} has both data and parameters.binary_data_size, allowed is one")
    if position is None:
        raise InvalidInput(f"{field} is {size_bytes}, which needs the header {LENGTH_HEADER}")
    if size_bytes > body_bytes - position:
        raise InvalidInput(
            f"{field} is {describe_value(size_bytes)}, the body has {body_bytes - position} bytes "
            "left for it"
        )
    return position + size_bytes
