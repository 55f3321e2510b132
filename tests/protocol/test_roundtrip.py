"""Laws: what is encoded is what is decoded, for every datatype, shape and wire."""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson
from hypothesis import given, settings
from hypothesis import strategies as st

from rayprism.core.tensors import Array, Datatype, datatype_of
from rayprism.core.values import array_from_values, values_from_array
from rayprism.protocol.grpc import (
    ModelInferRequest,
    ModelInferResponse,
    decode_infer_request_grpc,
    encode_infer_response_grpc,
)
from rayprism.protocol.http import decode_infer_request, encode_infer_response
from rayprism.protocol.messages import InferRequest, RequestedOutput
from tests.protocol.tensors import arrays, assert_same

fast = settings(deadline=None, max_examples=60)


def as_request(body: bytes, length: int | None) -> tuple[bytes, int | None]:
    """An answer made a request: the two describe tensors alike."""
    document = orjson.loads(body if length is None else body[:length])
    text = orjson.dumps({"id": document.get("id"), "inputs": document["outputs"]})
    return (text, None) if length is None else (text + body[length:], len(text))


@fast
@given(st.lists(arrays(), min_size=1, max_size=3), st.data())
def test_http(made: list[Array], data: st.DataObject) -> None:
    outputs = {f"output {index}": array for index, array in enumerate(made)}
    wanted = []
    for name, array in outputs.items():
        binary = data.draw(st.booleans())
        if datatype_of(array) is Datatype.BYTES:
            binary = True  # JSON takes UTF-8 only; see below
        if datatype_of(array).is_float:
            binary = binary or not np.isfinite(array).all()
        wanted.append(RequestedOutput(name, binary))
    request = InferRequest({}, id="é", outputs=tuple(data.draw(st.permutations(wanted))))
    body, length = encode_infer_response("m", "1", request, outputs)
    assert (length is None) == (not any(output.binary for output in wanted))
    decoded = decode_infer_request(*as_request(body, length))
    assert list(decoded.tensors) == [output.name for output in request.outputs]
    assert decoded.id == "é"
    for name, array in outputs.items():
        assert_same(decoded.tensors[name], array)
        assert decoded.tensors[name].flags.aligned
        assert decoded.tensors[name].flags.c_contiguous


@fast
@given(arrays(text_only=True, finite=True))
def test_http_json(array: Array) -> None:
    body, length = encode_infer_response("m", "1", InferRequest({}), {"y": array})
    assert length is None
    assert_same(decode_infer_request(*as_request(body, length)).tensors["y"], array)


@fast
@given(arrays(text_only=True))
def test_values(array: Array) -> None:
    datatype = datatype_of(array)
    assert_same(array_from_values("x", datatype, array.shape, values_from_array(array)), array)
    if array.ndim and array.size and datatype not in (Datatype.BYTES, Datatype.BF16):
        assert_same(array_from_values("x", datatype, array.shape, array.tolist()), array)


@fast
@given(st.lists(arrays(), min_size=1, max_size=3))
def test_grpc_raw(made: list[Array]) -> None:
    outputs = {f"output {index}": array for index, array in enumerate(made)}
    answer = encode_infer_response_grpc("m", "1", InferRequest({}, id="7"), outputs)
    answer = ModelInferResponse.FromString(answer.SerializeToString())
    message = ModelInferRequest(id=answer.id, raw_input_contents=answer.raw_output_contents)
    for output in answer.outputs:
        message.inputs.add(name=output.name, datatype=output.datatype, shape=output.shape)
    decoded = decode_infer_request_grpc(message)
    assert decoded.id == "7"
    for name, array in outputs.items():
        assert_same(decoded.tensors[name], array)


CONTENTS = {
    "BOOL": "bool",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int"),
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint"),
    "INT64": "int64",
    "UINT64": "uint64",
    "FP32": "fp32",
    "FP64": "fp64",
    "BYTES": "bytes",
}


@fast
@given(arrays().filter(lambda array: datatype_of(array) in CONTENTS))
def test_grpc_contents(array: Array) -> None:
    datatype = datatype_of(array)
    contents: dict[str, Any] = {f"{CONTENTS[datatype]}_contents": array.ravel().tolist()}
    message = ModelInferRequest()
    message.inputs.add(name="x", datatype=datatype, shape=array.shape, contents=contents)
    message = ModelInferRequest.FromString(message.SerializeToString())
    assert_same(decode_infer_request_grpc(message).tensors["x"], array)
