"""Inference requests and answers over HTTP: JSON, and binary tensor data behind it.

Source: Open Inference Protocol v2, "HTTP/REST"; Triton's binary tensor data extension.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson

from rayprism.core.tensors import Array, Datatype, Tensors, suggest
from rayprism.core.values import describe_value
from rayprism.errors import InvalidInput, ModelFailed, RequestError, Unsupported
from rayprism.protocol.body import LENGTH_HEADER, check_object, decode_tensors, parse_body
from rayprism.protocol.fields import (
    MAX_TENSORS,
    about_output,
    apply_parameters,
    check_id,
    check_model_name,
    check_name,
    check_output_parameters,
    check_version,
    timeout_s_or_none,
)
from rayprism.protocol.messages import InferRequest, InferResponse, RequestedOutput
from rayprism.protocol.raw import output_array, output_elements, raw_from_array
from rayprism.protocol.select import select_outputs

__all__ = [
    "decode_infer_request",
    "decode_infer_response",
    "encode_infer_response",
    "request_timeout_s",
    "select_outputs",
]

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
    if header_length == 0:
        raise Unsupported(
            f"header {LENGTH_HEADER} is 0: rayprism does not offer raw binary requests without "
            "JSON; send the inputs' names, datatypes and shapes as JSON before the binary tensors"
        )
    document = parse_body(body, header_length)
    request = InferRequest({}, check_id(document.get("id")))
    parameters = document.get("parameters")
    if parameters is not None:
        apply_parameters(request, check_object("parameters", parameters))
    inputs = document.get("inputs")
    if type(inputs) is not list or not inputs:
        raise _wrong_inputs(inputs, document)
    request.tensors = decode_tensors("inputs", inputs, body, header_length)
    outputs = document.get("outputs")
    if outputs is not None:
        request.outputs = _decode_outputs(outputs, request.binary_by_default)
    return request


def _wrong_inputs(inputs: Any, document: dict[str, Any]) -> InvalidInput:
    allowed = "allowed is a list of at least one tensor"
    if inputs is not None:
        return InvalidInput(f"inputs is {describe_value(inputs)}, {allowed}")
    near = ""
    for key in list(document)[:MAX_TENSORS]:
        if key not in _TOP_LEVEL and not near:
            near = f" It has {key!r}." if suggest(key[:64], ["inputs"]) else ""
    return InvalidInput(f"inputs is missing, {allowed}.{near}")


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
            check_object(f"{where}.parameters", parameters)
            binary = check_output_parameters(where, parameters, binary_by_default)
        wanted[name] = RequestedOutput(name, binary)
    return tuple(wanted.values())


def request_timeout_s(body: bytes | memoryview, header_length: int | None = None) -> float | None:
    """The time that a request allows, in seconds, without a look at its tensors.

    Most requests name none, and those are not even parsed: a key that is written with escapes, as
    no client does, is overlooked. A fault anywhere counts as none: `decode_infer_request`
    complains of it where the request is answered.

    Args:
        body: As for `decode_infer_request`.
        header_length: Likewise.
    """
    text = body if isinstance(body, bytes) else bytes(body[:header_length])
    if text.find(b'"timeout"', 0, header_length) < 0:
        return None
    try:
        parameters = parse_body(body, header_length).get("parameters")
    except InvalidInput:
        return None
    if type(parameters) is not dict or "timeout" not in parameters:
        return None
    return timeout_s_or_none(parameters["timeout"])


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


def decode_infer_response(
    body: bytes | memoryview, header_length: int | None = None
) -> InferResponse:
    """Decodes the answer to an inference request: undoes `encode_infer_response`.

    A null among floats becomes NaN. In JSON that is also what infinities have become, so only
    binary tensors tell them apart.

    Args:
        body: The whole body, already decompressed. Binary tensors become read-only views of it
            where they can.
        header_length: What the answer's header Inference-Header-Content-Length says; None where
            the header is missing and all is JSON.

    Raises:
        InvalidInput: It is no answer to an inference request, or is malformed.
    """
    try:
        document = parse_body(body, header_length)
        model = check_model_name(document.get("model_name"))
        version = check_version(document.get("model_version"))
        request_id = check_id(document.get("id"))
        described = document.get("outputs")
        if type(described) is not list:
            given = "missing" if described is None else describe_value(described)
            raise InvalidInput(f"outputs is {given}, allowed is a list of tensors")
        outputs = decode_tensors("outputs", described, body, header_length)
    except RequestError as error:
        raise about_output(error) from None
    return InferResponse(model, version, request_id, outputs)
