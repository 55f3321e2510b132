"""Bodies of requests, and what answers hold.

Binary and gRPC bodies are written, and all answers read, by the stock clients of the protocol, so
that no server is measured by its own codec.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import orjson

from bench.sentences import sentences
from rayprism.core.tensors import Array, Datatype, Tensors, datatype_of, numpy_dtype
from rayprism.core.values import array_from_values
from rayprism.errors import InvalidInput

__all__ = [
    "AnswerInvalid",
    "Body",
    "BodyKind",
    "RowsInvalid",
    "SignatureInvalid",
    "decode",
    "encode",
    "from_rows_file",
    "from_signature",
]

BodyKind = Literal["json", "binary", "grpc"]

_LENGTH_HEADER = "inference-header-content-length"
_JSON = (("content-type", "application/json"),)
_SHORTEST, _LONGEST = 1, 64
"""Of an axis that the signature leaves free."""
_CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
"""Source: Open Inference Protocol v2, "gRPC", `InferTensorContents`."""


class AnswerInvalid(Exception):
    """The body of an answer holds no outputs that can be read."""


class RowsInvalid(Exception):
    """A file of rows cannot be sent; says which line, and how to mend it."""


class SignatureInvalid(Exception):
    """A model's metadata does not tell what it takes."""


@dataclass(frozen=True)
class Body:
    """One request as it goes over the wire."""

    content: bytes
    headers: tuple[tuple[str, str], ...] = ()
    """Of HTTP, in small letters; gRPC has none."""


def encode(model: str, tensors: Tensors, kind: BodyKind) -> Body:
    """A request for all outputs.

    Args:
        model: Its name; only gRPC has it in the body.
        tensors: By input. BYTES are object arrays of `bytes`.
        kind: `json`: all is JSON, with as few digits as bring every float back. `binary`: JSON,
            and binary tensors behind it; the outputs are wanted in binary, too. `grpc`: a
            serialized `ModelInferRequest` with raw contents.

    Raises:
        ValueError: JSON cannot carry a tensor: it holds bytes that are not UTF-8.
    """
    if kind == "json":
        return Body(_json(tensors), _JSON)
    return _binary(tensors) if kind == "binary" else _grpc(model, tensors)


def _json(tensors: Tensors) -> bytes:
    inputs = [
        {
            "name": name,
            "shape": array.shape,
            "datatype": datatype_of(array).value,
            "data": _json_values(array),
        }
        for name, array in tensors.items()
    ]
    return orjson.dumps({"inputs": inputs}, option=orjson.OPT_SERIALIZE_NUMPY)


def _json_values(array: Array) -> Any:
    flat = np.ascontiguousarray(array).reshape(-1)
    datatype = datatype_of(array)
    if datatype is Datatype.BYTES:
        return [value.decode() for value in flat]
    # orjson writes what numpy itself has; a BF16 is exact as float32.
    return flat.astype(np.float32) if datatype is Datatype.BF16 else flat


def _binary(tensors: Tensors) -> Body:
    from tritonclient.http import InferenceServerClient, InferInput

    inputs = []
    for name, array in tensors.items():
        item = InferInput(name, list(array.shape), datatype_of(array).value)
        inputs.append(item.set_data_from_numpy(array, binary_data=True))
    content, length = InferenceServerClient.generate_request_body(inputs)
    headers = (("content-type", "application/octet-stream"), (_LENGTH_HEADER, str(length)))
    return Body(content, headers)


def _grpc(model: str, tensors: Tensors) -> Body:
    from tritonclient.grpc import service_pb2
    from tritonclient.utils import serialize_byte_tensor

    request = service_pb2.ModelInferRequest(model_name=model)
    for name, array in tensors.items():
        datatype = datatype_of(array)
        request.inputs.add(name=name, datatype=datatype.value, shape=array.shape)
        if datatype is not Datatype.BYTES:
            raw = array.tobytes()
        else:
            raw = serialize_byte_tensor(array).item() if array.size else b""
        request.raw_input_contents.append(raw)
    return Body(request.SerializeToString())


def decode(
    kind: BodyKind, headers: Mapping[str, str] | Iterable[tuple[str, str]], body: bytes
) -> Tensors:
    """The outputs in an answer with status 200 (or OK).

    Args:
        kind: Of the request. An answer to a `binary` one that comes without
            Inference-Header-Content-Length is read as JSON.
        headers: Of the answer; gRPC needs none.
        body: Of the answer, not compressed: no load asks for that.

    Returns:
        The outputs by name. Arrays may be read-only; BYTES are object arrays of `bytes`.

    Raises:
        AnswerInvalid: They cannot be read.
    """
    try:
        if kind == "grpc":
            return _decode_grpc(body)
        pairs = headers.items() if isinstance(headers, Mapping) else headers
        return _decode_http(body, {name.lower(): value for name, value in pairs})
    except Exception as error:  # Whatever a client stumbles over in what a server sends.
        raise AnswerInvalid(
            f"no answer to an inference request ({type(error).__name__}: {error}): {body[:200]!r}"
        ) from None


def _decode_http(body: bytes, headers: Mapping[str, str]) -> Tensors:
    from tritonclient.http import InferResult

    result = InferResult.from_response_body(body, header_length=headers.get(_LENGTH_HEADER))
    names = [output["name"] for output in result.get_response()["outputs"]]
    return {name: _bytes_for_text(result.as_numpy(name)) for name in names}


def _bytes_for_text(array: Array) -> Array:
    if array.dtype != np.object_:
        return array
    raw = np.empty(array.size, object)
    raw[:] = [item.encode() if isinstance(item, str) else item for item in array.flat]
    return raw.reshape(array.shape)


def _decode_grpc(body: bytes) -> Tensors:
    from tritonclient.grpc import InferResult, service_pb2

    message = service_pb2.ModelInferResponse.FromString(body)
    if message.raw_output_contents:
        result = InferResult(message)
        return {output.name: result.as_numpy(output.name) for output in message.outputs}
    # The stock client reads no typed contents but BYTES, which other servers send.
    outputs = {}
    for output in message.outputs:
        values = getattr(output.contents, _CONTENTS[output.datatype])
        array = np.array(list(values), numpy_dtype(Datatype(output.datatype)))
        outputs[output.name] = array.reshape(list(output.shape))
    return outputs


def from_rows_file(
    model: str, signature: Mapping[str, Any], path: Path, rows: int, kind: BodyKind
) -> list[Body]:
    """Requests of real rows.

    Args:
        model: Its name.
        signature: The model's metadata (`GET /v2/models/NAME`), or as much of it as
            `BenchModel.signature` gives.
        path: JSON Lines: {input name: value}, a value nested as a row of the input is. Lines are
            taken in their order.
        rows: In each request; the last one is filled up with lines from the start.
        kind: Of the bodies.

    Raises:
        RowsInvalid: The file cannot be read, is empty, or a line does not fit the signature.
        SignatureInvalid: It does not tell the inputs.
    """
    specs = _specs(signature)
    taken = [_row(specs, line, f"{path}:{number}") for number, line in _lines(path)]
    if not taken:
        raise RowsInvalid(f"{path} holds no rows. Give one JSON object a line: {{input: value}}")
    bodies = []
    for start in range(0, len(taken), rows):
        chosen = [taken[index % len(taken)] for index in range(start, start + rows)]
        try:
            tensors = {name: np.stack([row[name] for row in chosen]) for name in specs}
        except ValueError:
            raise RowsInvalid(
                f"{path}: rows of one request differ in shape, and the client pads none. Set "
                "rows: 1, or sort the file so that rows of the same shape follow each other"
            ) from None
        bodies.append(encode(model, tensors, kind))
    return bodies


def _lines(path: Path) -> list[tuple[int, str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RowsInvalid(f"{path} cannot be read: {error}. Give a file of JSON Lines") from None
    # Not `splitlines`, which also cuts at separators that may stand in a JSON string.
    return [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


_Specs = Mapping[str, tuple[Datatype, tuple[int, ...]]]


def _specs(signature: Mapping[str, Any]) -> _Specs:
    try:
        specs = {
            item["name"]: (Datatype(item["datatype"]), tuple(map(int, item["shape"])))
            for item in signature["inputs"]
        }
    except (KeyError, TypeError, ValueError) as error:
        raise SignatureInvalid(
            f"the model's metadata tells no inputs that can be made ({error!r}); each needs a "
            f"name, a datatype of the Open Inference Protocol and a shape: {signature!r:.300}"
        ) from None
    if not specs:
        raise SignatureInvalid(
            "the model's metadata has no inputs, so no request can be made: its server has to be "
            "told what the model takes"
        )
    return specs


def _row(specs: _Specs, line: str, where: str) -> Tensors:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise RowsInvalid(f"{where} is not JSON: {error}") from None
    if not isinstance(row, dict) or set(row) != set(specs):
        names = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise RowsInvalid(
            f"{where} holds {names}, allowed is an object with just the model's inputs: "
            f"{', '.join(specs)}"
        )
    return {name: _row_value(where, name, *spec, row[name]) for name, spec in specs.items()}


def _row_value(
    where: str, name: str, datatype: Datatype, shape: tuple[int, ...], value: Any
) -> Array:
    inner = shape[1:]
    found = _nested_shape(value)
    if found == ():
        value = [value]
        if all(size in (1, -1) for size in inner):
            found = (1,) * len(inner)
    fits = len(found) == len(inner) and all(
        want in (-1, size) for want, size in zip(inner, found, strict=True)
    )
    if not fits:
        raise RowsInvalid(
            f"{where}: {name!r} is of shape {list(found)}, a row of it is {list(inner)} "
            "(-1: any size)"
        )
    try:
        return array_from_values(name, datatype, found, value)
    except InvalidInput as error:
        raise RowsInvalid(f"{where}: {error}") from None


def _nested_shape(value: Any) -> tuple[int, ...]:
    shape = []
    while isinstance(value, list):
        shape.append(len(value))
        value = value[0] if value else None
    return tuple(shape)


def from_signature(
    metadata: Mapping[str, Any], count: int, rows: int, kind: BodyKind, seed: int
) -> list[Body]:
    """Requests of invented values, for a server of which nothing is known but its signature.

    Floats are normal with four decimals, integers from 0 to 9, BYTES sentences.

    Args:
        metadata: What `GET /v2/models/NAME` answers: `name`, `inputs`.
        count: Of requests.
        rows: In each: the size of a free first axis. Other free axes get a size from 1 to 64, the
            same for all inputs of a request, as a mask is as long as its tokens.
        kind: Of the bodies.
        seed: The same seed gives the same bodies.

    Raises:
        SignatureInvalid: The metadata does not tell the inputs.
    """
    random = np.random.default_rng(seed)
    specs = _specs(metadata)
    bodies = []
    for _ in range(count):
        free = int(random.integers(_SHORTEST, _LONGEST + 1))
        tensors = {
            name: _invent(datatype, _filled(shape, rows, free), random)
            for name, (datatype, shape) in specs.items()
        }
        bodies.append(encode(metadata["name"], tensors, kind))
    return bodies


def _filled(shape: tuple[int, ...], rows: int, free: int) -> tuple[int, ...]:
    return tuple(size if size >= 0 else (free if axis else rows) for axis, size in enumerate(shape))


def _invent(datatype: Datatype, shape: tuple[int, ...], random: np.random.Generator) -> Array:
    dtype = numpy_dtype(datatype)
    if datatype is Datatype.BYTES:
        texts = sentences(int(np.prod(shape)), int(random.integers(2**31)))
        return np.array([text.encode() for text in texts], object).reshape(shape)
    if datatype is Datatype.BOOL:
        return random.integers(0, 2, shape).astype(dtype)
    if datatype.is_float:
        return np.round(random.normal(0.0, 1.0, shape), 4).astype(dtype)
    return random.integers(0, 10, shape).astype(dtype)
