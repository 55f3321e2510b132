"""Whatever bytes come, only errors of ours come out."""

from __future__ import annotations

import contextlib
import json
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayprism.errors import RequestError
from rayprism.protocol.compression import decompress
from rayprism.protocol.grpc import ModelInferRequest, decode_infer_request_grpc
from rayprism.protocol.http import decode_infer_request, encode_infer_response
from rayprism.protocol.status import error_body

fuzz = settings(deadline=None, max_examples=250)

TENSORS: list[dict[str, Any]] = [
    {"name": "a", "datatype": "FP32", "shape": [2, 2], "data": [[1, 2.5], [None, 4]]},
    {"name": "b", "datatype": "BYTES", "shape": [2], "parameters": {"binary_data_size": 11}},
    {"name": "c", "datatype": "INT64", "shape": [1], "parameters": {"binary_data_size": 8}},
    {"name": "d", "datatype": "BOOL", "shape": [2], "parameters": {"binary_data_size": 2}},
]
RAW = b"\x01\x00\x00\x00a\x02\x00\x00\x00bc" + bytes(8) + b"\x00\x01"
DOCUMENT: dict[str, Any] = {
    "id": "1",
    "parameters": {"timeout": 5, "priority": 1, "binary_data_output": True, "x": "y"},
    "inputs": TENSORS,
    "outputs": [{"name": "y", "parameters": {"binary_data": False}}],
}
TEXT = json.dumps(DOCUMENT).encode()

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(2**62, 2**66)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["FP32", "BYTES", "BF16", "BOOL", "\ud800", "x" * 300])
)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)


def check(body: bytes, length: int | None) -> None:
    try:
        request = decode_infer_request(body, length)
    except RequestError as error:
        json.loads(error_body(error))
        return
    for array in request.tensors.values():
        assert isinstance(array, np.ndarray)
    # What was accepted can be answered.
    with contextlib.suppress(RequestError):
        encode_infer_response("m", "1", request, {"y": np.zeros(1), **request.tensors})


def test_the_original_is_valid() -> None:
    assert list(decode_infer_request(TEXT + RAW, len(TEXT)).tensors) == ["a", "b", "c", "d"]


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, inner in items:
        found.extend(paths(inner, (*path, key)))
    return found


PATHS = paths(DOCUMENT)[1:]


@fuzz
@given(st.lists(st.tuples(st.sampled_from(PATHS), anything), min_size=1, max_size=3), st.booleans())
def test_any_value_anywhere_in_the_json(
    changes: list[tuple[tuple[Any, ...], Any]], drop: bool
) -> None:
    document = json.loads(TEXT)
    for path, value in changes:
        target = document
        try:
            for key in path[:-1]:
                target = target[key]
            if drop:
                del target[path[-1]]
            else:
                target[path[-1]] = value
        except (KeyError, IndexError, TypeError):
            continue
    text = json.dumps(document).encode()
    check(text + RAW, len(text))
    check(text, None)


@fuzz
@given(
    st.lists(st.tuples(st.integers(0, len(TEXT + RAW) - 1), st.integers(0, 255)), max_size=4),
    st.integers(-3, 3),
    st.integers(0, 30),
)
def test_any_byte_anywhere(changes: list[tuple[int, int]], shift: int, cut: int) -> None:
    body = bytearray(TEXT + RAW)
    for position, value in changes:
        body[position] = value
    check(bytes(body[: len(body) - cut]), len(TEXT) + shift)
    check(bytes(body), None)


@fuzz
@given(st.binary(max_size=60), st.none() | st.integers(-2, 70))
def test_noise(body: bytes, length: int | None) -> None:
    check(body, length)


@fuzz
@given(anything)
def test_any_document(document: Any) -> None:
    check(json.dumps(document).encode(), None)


def message() -> Any:
    valid = ModelInferRequest(id="1", raw_input_contents=[RAW[:11], RAW[11:19]])
    valid.inputs.add(name="b", datatype="BYTES", shape=[2])
    valid.inputs.add(name="c", datatype="INT64", shape=[1])
    valid.outputs.add(name="y").parameters["binary_data"].bool_param = True
    valid.parameters["timeout"].int64_param = 5
    return valid


WIRE = message().SerializeToString()


def check_grpc(wire: bytes) -> None:
    try:
        parsed = ModelInferRequest.FromString(wire)
    except Exception:  # gRPC itself refuses it
        return
    with contextlib.suppress(RequestError):
        decode_infer_request_grpc(parsed)


@fuzz
@given(
    st.lists(st.tuples(st.integers(0, len(WIRE) - 1), st.integers(0, 255)), max_size=4),
    st.integers(0, 5),
)
def test_any_byte_of_a_message(changes: list[tuple[int, int]], cut: int) -> None:
    wire = bytearray(WIRE)
    for position, value in changes:
        wire[position] = value
    check_grpc(bytes(wire[: len(wire) - cut]))


tensor_fields = st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from(["a", "b", ""]),
        "datatype": st.sampled_from(["FP32", "INT8", "BYTES", "FP16", "BOOL", "UINT8", "nope"]),
        "shape": st.lists(st.integers(-1, 3) | st.sampled_from([2**62, 2**63 - 1]), max_size=3),
        "contents": st.fixed_dictionaries(
            {},
            optional={
                "int_contents": st.lists(st.integers(-200, 200), max_size=4),
                "fp32_contents": st.lists(st.floats(width=32), max_size=4),
                "bytes_contents": st.lists(st.binary(max_size=3), max_size=4),
                "bool_contents": st.lists(st.booleans(), max_size=4),
            },
        ),
    },
)


@fuzz
@given(st.lists(tensor_fields, max_size=3), st.lists(st.binary(max_size=9), max_size=3))
def test_any_message(inputs: list[dict[str, Any]], raw: list[bytes]) -> None:
    check_grpc(ModelInferRequest(inputs=inputs, raw_input_contents=raw).SerializeToString())


@fuzz
@given(
    st.sampled_from(["gzip", "deflate", "identity", "br", "\udc80"]),
    st.binary(max_size=40),
    st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=3),
    st.sampled_from([31, 15, -15]),
)
def test_any_compressed_body(
    encoding: str, noise: bytes, changes: list[tuple[int, int]], wbits: int
) -> None:
    packer = zlib.compressobj(6, zlib.DEFLATED, wbits)
    packed = bytearray(packer.compress(TEXT) + packer.flush())
    for position, value in changes:
        packed[position % len(packed)] = value
    for body in (bytes(packed), bytes(packed) + noise, noise):
        with contextlib.suppress(RequestError):
            assert len(decompress(body, encoding, 5000)) <= 5000


@pytest.mark.parametrize("size", [2**31, 2**40, 2**60, 2**63 - 1])
def test_a_huge_shape_allocates_nothing(size: int) -> None:
    for datatype in ("FP32", "BYTES", "BF16", "BOOL"):
        tensor = {"name": "x", "datatype": datatype, "shape": [size], "data": []}
        with pytest.raises(RequestError):
            decode_infer_request(json.dumps({"inputs": [tensor]}).encode())
