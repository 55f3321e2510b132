"""Inference requests and answers over HTTP: JSON, and binary tensor data behind it.

Source: Open Inference Protocol v2, "HTTP/REST"; Triton's binary tensor data extension.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import orjson

from rayprism.core.tensors import Array, Datatype, Tensors, suggest
from rayprism.core.values import array_from_values, describe_value
from rayprism.errors import InvalidInput, ModelFailed, Unsupported
from rayprism.protocol.fields import (
    MAX_TENSORS,
    apply_parameters,
    check_count,
    check_id,
    check_name,
    check_output_parameters,
    check_shape,
    parse_datatype,
    refuse_shared_memory,
)
from rayprism.protocol.messages import InferRequest, RequestedOutput
from rayprism.protocol.raw import array_from_raw, output_array, output_elements, raw_from_array
from rayprism.protocol.select import select_outputs

__all__ = ["decode_infer_request", "encode_infer_response", "select_outputs"]

_HEADER = "Inference-Header-Content-Length"
_VIEW_FROM_BYTES = 64 * 1024
"""Outputs from this size are copied once, straight into the body; below, a view costs more."""
_TOP_LEVEL = ("id", "inputs", "outputs", "parameters")


def decode_infer_request(
    body: bytes | memoryview, header_length: int | None = None
) -> InferRequest:
    """Decodes the body of an inference request.

    Binary tensors are read-only views of `body` where they can be: see
    `rayprism.protocol.raw.array_from_raw`. Null stands for an absent `id`, `outputs` or
    `parameters`. Keys that the protocol does not know are passed over.

    Args:
        body: The whole body, already decompressed.
        header_length: What the header Inference-Header-Content-Length says: the bytes of JSON
            before the binary tensors. None where the header is missing and all is JSON.

    Raises:
        InvalidInput: The request is malformed; names the field, what was got, what is allowed.
        Unsupported: It uses an extension that rayprism does not offer.
    """
    if header_length is None:
        document = _parse_json(body, whole=True)
    else:
        _check_header_length(header_length, len(body))
        document = _parse_json(memoryview(body)[:header_length], whole=False)
    if type(document) is not dict:
        raise InvalidInput(f"the body is {describe_value(document)}, allowed is a JSON object")
    request = InferRequest({}, check_id(document.get("id")))
    parameters = document.get("parameters")
    if parameters is not None:
        apply_parameters(request, _check_object("parameters", parameters))
    _decode_inputs(request.tensors, document, body, header_length)
    outputs = document.get("outputs")
    if outputs is not None:
        request.outputs = _decode_outputs(outputs, request.binary_by_default)
    return request


def _check_header_length(header_length: int, body_bytes: int) -> None:
    if header_length == 0:
        raise Unsupported(
            f"header {_HEADER} is 0: rayprism does not offer raw binary requests without JSON; "
            "send the inputs' names, datatypes and shapes as JSON before the binary tensors"
        )
    if not 0 < header_length <= body_bytes:
        raise InvalidInput(
            f"header {_HEADER} is {header_length}, allowed is the length of the JSON, "
            f"1 to {body_bytes} in a body of {body_bytes} bytes"
        )


def _parse_json(text: bytes | memoryview, *, whole: bool) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        pass
    if not text:
        raise InvalidInput("the body is empty, allowed is a JSON object")
    # Python's own parser also takes NaN and Infinity, which Python clients send.
    hint = f". Binary tensors behind JSON need the header {_HEADER}" if whole else ""
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


def _check_object(where: str, value: Any) -> dict[str, Any]:
    if type(value) is not dict:
        raise InvalidInput(f"{where} is {describe_value(value)}, allowed is an object")
    return value


def _decode_inputs(
    tensors: Tensors,
    document: dict[str, Any],
    body: bytes | memoryview,
    header_length: int | None,
) -> None:
    inputs = document.get("inputs")
    if type(inputs) is not list or not inputs:
        raise _wrong_inputs(inputs, document)
    if len(inputs) > MAX_TENSORS:
        raise InvalidInput(f"inputs has {len(inputs)} items, allowed are at most {MAX_TENSORS}")
    position = header_length
    for index, item in enumerate(inputs):
        where = f"inputs[{index}]"
        if type(item) is not dict:
            raise InvalidInput(f"{where} is {describe_value(item)}, allowed is an object")
        name = check_name(where, item.get("name"), tensors)
        datatype = parse_datatype(where, item.get("datatype"))
        shape = check_shape(where, item.get("shape"))
        size_bytes = None
        parameters = item.get("parameters")
        if parameters is not None:
            refuse_shared_memory(where, _check_object(f"{where}.parameters", parameters))
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
            f"{len(body) - position} bytes are left over behind the inputs' binary tensors: "
            "the sum of their parameters.binary_data_size has to be the rest of the body"
        )


def _wrong_inputs(inputs: Any, document: dict[str, Any]) -> InvalidInput:
    allowed = "allowed is a list of at least one tensor"
    if inputs is not None:
        return InvalidInput(f"inputs is {describe_value(inputs)}, {allowed}")
    near = ""
    for key in list(document)[:MAX_TENSORS]:
        if key not in _TOP_LEVEL and not near:
            near = f" It has {key!r}." if suggest(key[:64], ["inputs"]) else ""
    return InvalidInput(f"inputs is missing, {allowed}.{near}")


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
        raise InvalidInput(f"{field} is {size_bytes}, which needs the header {_HEADER}")
    if size_bytes > body_bytes - position:
        raise InvalidInput(
            f"{field} is {describe_value(size_bytes)}, the body has {body_bytes - position} bytes "
            "left for it"
        )
    return position + size_bytes


def _decode_outputs(outputs: Any, binary_by_default: bool) -> tuple[RequestedOutput, ...]:
    if type(outputs) is not list:
        raise InvalidInput(f"outputs is {describe_value(outputs)}, allowed is a list")
    if len(outputs) > MAX_TENSORS:
        raise InvalidInput(f"outputs has {len(outputs)} items, allowed are at most {MAX_TENSORS}")
    wanted: dict[str, RequestedOutput] = {}
    for index, item in enumerate(outputs):
        where = f"outputs[{index}]"
        if type(item) is not dict:
            raise InvalidInput(f"{where} is {describe_value(item)}, allowed is an object")
        name = check_name(where, item.get("name"), wanted)
        binary = binary_by_default
        parameters = item.get("parameters")
        if parameters is not None:
            _check_object(f"{where}.parameters", parameters)
            binary = check_output_parameters(where, parameters, binary_by_default)
        wanted[name] = RequestedOutput(name, binary)
    return tuple(wanted.values())


def encode_infer_response(
    model: str, version: str, request: InferRequest, outputs: Tensors
) -> tuple[bytes, int | None]:
    """Encodes the answer to an inference request.

    JSON has no NaN and no infinities. In JSON they become null, and the output's parameters then
    say `non_finite_as_null`; binary tensor data carries them as they are.

    Args:
        model: The model's name.
        version: The version that answered.
        request: What is answered: its id, and which outputs it wants, and how.
        outputs: The model's outputs, all or only the wanted ones.

    Returns:
        The body, and the length of the JSON in front of binary tensors, for the header
        Inference-Header-Content-Length; None where all of it is JSON.

    Raises:
        InvalidInput: An output is wanted that is not there, or a BYTES output is wanted in JSON
            that is not UTF-8.
        ModelFailed: An output is of a kind that the protocol does not have.
    """
    document: dict[str, Any] = {"model_name": model, "model_version": version}
    if request.id:
        document["id"] = request.id
    described: list[dict[str, Any]] = []
    document["outputs"] = described
    chunks: list[Any] = []
    if request.outputs:
        select_outputs(request, list(outputs))
        for wanted in request.outputs:
            described.append(_describe(wanted.name, outputs[wanted.name], wanted.binary, chunks))
    else:
        for name, array in outputs.items():
            described.append(_describe(name, array, request.binary_by_default, chunks))
    text = _dump(document)
    if not chunks:
        # Cheaper than looking at every value of every answer: what JSON cannot hold became null.
        return (text if b"null" not in text else _dump(_mark_non_finite(document))), None
    if b"null" in text:
        text = _dump(_mark_non_finite(document))
    return b"".join([text, *chunks]), len(text)


def _dump(document: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
    except TypeError as error:
        raise ModelFailed(f"the model's answer cannot be written as JSON: {error}") from None


def _describe(name: str, array: Array, binary: bool, chunks: list[Any]) -> dict[str, Any]:
    datatype, array = output_array(name, array)
    described: dict[str, Any] = {
        "name": name,
        "datatype": datatype.value,
        "shape": array.shape,
    }
    if binary:
        if datatype is Datatype.BYTES or array.nbytes < _VIEW_FROM_BYTES:
            chunk: Any = raw_from_array(name, datatype, array)
            described["parameters"] = {"binary_data_size": len(chunk)}
        else:
            chunk = array.reshape(-1).view(np.uint8)
            described["parameters"] = {"binary_data_size": array.nbytes}
        chunks.append(chunk)
    elif datatype is Datatype.BYTES:
        try:
            described["data"] = [value.decode() for value in output_elements(name, array)]
        except UnicodeDecodeError:
            raise InvalidInput(
                f"output {name!r} holds bytes that are not UTF-8, which JSON cannot carry: ask for "
                "it as binary tensor data (parameters.binary_data of the output, or "
                "parameters.binary_data_output of the request: true)"
            ) from None
    elif datatype is Datatype.BF16:
        described["data"] = array.reshape(-1).astype(np.float32)
    else:
        described["data"] = array.reshape(-1)
    return described


def _mark_non_finite(document: dict[str, Any]) -> dict[str, Any]:
    for described in document["outputs"]:
        data = described.get("data")
        if isinstance(data, np.ndarray) and data.dtype.kind == "f" and not np.isfinite(data).all():
            described["parameters"] = {"non_finite_as_null": True}
    return document
