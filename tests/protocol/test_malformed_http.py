"""Malformed HTTP requests: each gets an error of ours that names the field, and never another."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rayprism.errors import InvalidInput, RequestError, Unsupported
from rayprism.protocol.http import decode_infer_request

X = {"name": "x", "datatype": "FP32", "shape": [2], "data": [1.0, 2.0]}
DEEP = b"[" * 200_000 + b"]" * 200_000


def one(**changes: Any) -> dict[str, Any]:
    """A request with one input; a change to `...` leaves the key out."""
    tensor = {**X, **changes}
    return {"inputs": [{key: value for key, value in tensor.items() if value is not ...}]}


def typed(datatype: str, *values: Any) -> dict[str, Any]:
    return one(datatype=datatype, shape=[len(values)], data=list(values))


def with_top(**more: Any) -> dict[str, Any]:
    return {**one(), **more}


def with_parameters(**parameters: Any) -> dict[str, Any]:
    return with_top(parameters=parameters)


def with_output(*items: Any) -> dict[str, Any]:
    return with_top(outputs=list(items))


# What is sent (bytes as they are, all else as JSON), and what the message has to say.
JSON_FAULTS: list[tuple[Any, str]] = [
    # The document
    (b"", "body is empty"),
    (b" ", "malformed"),
    (b"{", r"malformed.*line 1 column 2"),
    (b'{"inputs": [}', r"character 12"),
    (b"{'inputs': 1}", "malformed"),
    (b"\xff\xfe", "byte 0 is not UTF-8"),
    (b'{"inputs": "\xc3\x28"}', "byte 12 is not UTF-8"),
    (json.dumps(one()).encode() + b"\x00\x00\x80\x3f", "Inference-Header-Content-Length"),
    (json.dumps(one()).encode() + b"{}", "Inference-Header-Content-Length"),
    (json.dumps(one()).encode("utf-16"), "not UTF-8"),
    (b'{"inputs": ' + DEEP + b"}", "nested too deeply"),
    (b'{"inputs": [{"data": ' + DEEP + b"}]}", "nested too deeply"),
    (b'{"a": ' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
    (b'{"x": ' + b"9" * 5000 + b', "y": NaN}', "too many digits"),
    ([], r"body is an empty list, allowed is a JSON object"),
    ([1], "body is a list"),
    ("x", "body is the string 'x'"),
    (1, "body is the number 1"),
    (True, "body is true"),
    (None, "body is null"),
    # inputs
    ({}, "inputs is missing"),
    ({"input": [X]}, r"inputs is missing.*It has 'input'"),
    ({"Inputs": [X]}, r"inputs is missing.*It has 'Inputs'"),
    ({"inputs": None}, "inputs is missing"),
    ({"inputs": []}, "inputs is an empty list"),
    ({"inputs": {}}, "inputs is an object"),
    ({"inputs": X}, "inputs is an object"),
    ({"inputs": "x"}, "inputs is the string"),
    ({"inputs": 0}, "inputs is the number 0"),
    ({"inputs": False}, "inputs is false"),
    ({"inputs": [None]}, r"inputs\[0\] is null"),
    ({"inputs": [X, 1]}, r"inputs\[1\] is the number 1"),
    ({"inputs": [X, [X]]}, r"inputs\[1\] is a list"),
    ({"inputs": [X, X]}, r"inputs\[1\].name is 'x' again"),
    ({"inputs": [X] * 1025}, "inputs has 1025 items"),
    # name
    (one(name=...), r"inputs\[0\].name is missing"),
    (one(name=None), r"inputs\[0\].name is missing"),
    (one(name=1), r"inputs\[0\].name is the number 1"),
    (one(name=["x"]), r"inputs\[0\].name is a list"),
    (one(name={}), r"inputs\[0\].name is an object"),
    (one(name=""), r"inputs\[0\].name has 0 characters"),
    (one(name="x" * 257), r"inputs\[0\].name has 257 characters"),
    # datatype
    (one(datatype=...), r"inputs\[0\].datatype is missing"),
    (one(datatype=32), r"inputs\[0\].datatype is the number 32"),
    (one(datatype=["FP32"]), r"inputs\[0\].datatype is a list"),
    (one(datatype={}), r"inputs\[0\].datatype is an object"),
    (one(datatype=""), r"inputs\[0\].datatype is the string ''"),
    (one(datatype="FP33"), r"Did you mean 'FP32'.*Allowed: BOOL"),
    (one(datatype="fp32"), "Did you mean 'FP32'"),
    (one(datatype="STRING"), r"inputs\[0\].datatype .* Allowed: .*BYTES"),
    (one(datatype="INT"), "Did you mean 'INT"),
    (one(datatype="Z" * 100_000), r"inputs\[0\].datatype is the string 'Z{40}'"),
    # shape
    (one(shape=...), r"inputs\[0\].shape is missing"),
    (one(shape=2), r"inputs\[0\].shape is the number 2"),
    (one(shape="2"), r"inputs\[0\].shape is the string '2'"),
    (one(shape={}), r"inputs\[0\].shape is an object"),
    (one(shape=["2"]), r"inputs\[0\].shape\[0\] is the string '2'"),
    (one(shape=[2.0]), r"inputs\[0\].shape\[0\] is the number 2.0"),
    (one(shape=[1, True]), r"inputs\[0\].shape\[1\] is true"),
    (one(shape=[False]), r"inputs\[0\].shape\[0\] is false"),
    (one(shape=[None]), r"inputs\[0\].shape\[0\] is null"),
    (one(shape=[[2]]), r"inputs\[0\].shape\[0\] is a list"),
    (one(shape=[-1]), r"inputs\[0\].shape\[0\] is the number -1"),
    (one(shape=[2**63]), r"inputs\[0\].shape\[0\] is the number 9223372036854775808"),
    (one(shape=[10**30]), r"inputs\[0\].shape\[0\]"),
    (one(shape=[2**62, 2**62]), r"inputs\[0\].shape .* more elements than"),
    (one(shape=[2**32, 2**32]), "more elements than"),
    (one(shape=[0, 2**62, 2**62], data=[]), "more elements than"),
    (one(shape=[0, 2**63 - 1], data=[]), "more elements than"),
    (one(shape=[2**40]), "got 2 values, shape .* needs 1099511627776"),
    (one(shape=[1] * 33), r"inputs\[0\].shape has 33 axes"),
    (one(shape=[3]), "input 'x': got 2 values, shape .3. needs 3"),
    (one(shape=[0]), "got 2 values, shape .0. needs 0"),
    (one(shape=[]), r"got 2 values, shape \[\] needs 1"),
    # data
    (one(data=...), r"inputs\[0\].data is missing.*binary_data_size"),
    (one(data=None), "input 'x': data is null"),
    (one(data=1.0), "input 'x': data is the number 1.0"),
    (one(data="12"), "input 'x': data is the string '12'"),
    (one(data={"0": 1}), "input 'x': data is an object"),
    (one(data=[]), "got 0 values, shape .2. needs 2"),
    (one(data=[[1.0, 2.0]]), "nested otherwise"),
    (one(data=[[1.0], [2.0]]), "nested deeper"),
    (one(data=[1.0, [2.0]]), "value 1 is a list"),
    (one(shape=[2, 2], data=[[1, 2], [3]]), "got 1 values at axis 1, allowed is a list of 2"),
    (one(shape=[2, 2], data=[[1, 2], 3]), "got the number 3 at axis 1"),
    (one(shape=[2, 2], data=[[1, 2], [3, [4]]]), "nested deeper"),
    (one(shape=[1, 2], data=[[[1, 2]]]), "got 1 values at axis 1"),
    (typed("FP32", 1, "2"), "value 1 is the string '2', allowed for FP32 are numbers"),
    (typed("FP32", 1, True), "value 1 is true"),
    (typed("FP32", False), "value 0 is false"),
    (typed("FP32", {}), "value 0 is an object"),
    (typed("FP32", 1e39), "value 0 is the number 1e\\+39, out of range for FP32"),
    (typed("FP32", 1, -(10**400)), "value 1 .* out of range for FP32"),
    (typed("FP64", 10**400), "value 0 .* out of range for FP64"),
    (typed("FP16", 65520), "value 0 is the number 65520, out of range for FP16"),
    (typed("BF16", 3.4e38), "out of range for BF16"),
    (typed("BF16", 1e39), "out of range for BF16"),
    (typed("FP64", "NaN"), "value 0 is the string 'NaN'"),
    (typed("INT8", 128), r"value 0 is the number 128, out of range for INT8 \(-128 to 127\)"),
    (typed("INT8", -129), "out of range for INT8"),
    (typed("INT16", 32768), "out of range for INT16"),
    (typed("INT32", 2**31), "out of range for INT32"),
    (typed("INT64", 2**63), "out of range for INT64"),
    (typed("UINT8", 1, 256), "value 1 is the number 256, out of range for UINT8"),
    (typed("UINT16", -1), "out of range for UINT16"),
    (typed("UINT32", 2**32), "out of range for UINT32"),
    (typed("UINT64", -1), "out of range for UINT64"),
    (
        typed("UINT64", 2**64),
        r"value 0 is the number 1.8446744073709552e\+19, allowed .* from 0 to",
    ),
    (typed("INT32", 1.0), "value 0 is the number 1.0, allowed for INT32 are whole numbers"),
    (typed("INT32", None), "value 0 is null"),
    (typed("INT32", True), "value 0 is true"),
    (typed("INT32", "1"), "value 0 is the string '1'"),
    (typed("BOOL", 1), "value 0 is the number 1, allowed for BOOL are true and false"),
    (typed("BOOL", True, None), "value 1 is null"),
    (typed("BOOL", "true"), "value 0 is the string 'true'"),
    (typed("BYTES", 1), "value 0 is the number 1, allowed for BYTES are strings"),
    (typed("BYTES", "a", None), "value 1 is null"),
    (typed("BYTES", "a", ["b"]), "value 1 is a list"),
    (one(datatype="BYTES", shape=[2, 1], data=[["a"], ["b", "c"]]), "got 2 values at axis 1"),
    (
        b'{"inputs": [{"name": "x", "datatype": "BYTES", "shape": [1], "data": ["\\ud800"]}]}',
        "input 'x': .* surrogate pair",
    ),
    # parameters of an input
    (one(parameters=[]), r"inputs\[0\].parameters is an empty list"),
    (one(parameters="x"), r"inputs\[0\].parameters is the string"),
    (one(parameters={"binary_data_size": 8}), "both data and parameters.binary_data_size"),
    (one(data=..., parameters={"binary_data_size": 8}), "needs the header"),
    (one(data=..., parameters={}), r"inputs\[0\].data is missing"),
    # id
    (with_top(id=1), "id is the number 1"),
    (with_top(id=["a"]), "id is a list"),
    (with_top(id=True), "id is true"),
    (with_top(id="x" * 1025), "id has 1025 characters"),
    (json.dumps(with_top(id="\ud800")).encode(), "id holds half of a surrogate pair"),
    # parameters
    (with_top(parameters=[]), "parameters is an empty list"),
    (with_top(parameters="x"), "parameters is the string"),
    (with_top(parameters=0), "parameters is the number 0"),
    (with_parameters(timeout=-1), "parameters.timeout is the number -1.*microseconds"),
    (with_parameters(timeout=1.5), "parameters.timeout is the number 1.5"),
    (with_parameters(timeout="1"), "parameters.timeout is the string '1'"),
    (with_parameters(timeout=True), "parameters.timeout is true"),
    (with_parameters(timeout=None), "parameters.timeout is null"),
    (with_parameters(timeout=10**400), "parameters.timeout is the number 1000"),
    (with_parameters(priority=-1), "parameters.priority is the number -1"),
    (with_parameters(priority="high"), "parameters.priority is the string 'high'"),
    (with_parameters(priority=True), "parameters.priority is true"),
    (with_parameters(binary_data_output=1), "parameters.binary_data_output is the number 1"),
    (with_parameters(binary_data_output=None), "parameters.binary_data_output is null"),
    (with_parameters(tenant=["a"]), "parameters.tenant is a list"),
    (with_parameters(tenant={}), "parameters.tenant is an object"),
    (with_parameters(tenant=None), "parameters.tenant is null"),
    # outputs
    (with_top(outputs={}), "outputs is an object"),
    (with_top(outputs="y"), "outputs is the string 'y'"),
    (with_output("y"), r"outputs\[0\] is the string 'y'"),
    (with_output({"name": "y"}, None), r"outputs\[1\] is null"),
    (with_output({}), r"outputs\[0\].name is missing"),
    (with_output({"name": 1}), r"outputs\[0\].name is the number 1"),
    (with_output({"name": ""}), r"outputs\[0\].name has 0 characters"),
    (with_output({"name": "y"}, {"name": "y"}), r"outputs\[1\].name is 'y' again"),
    (with_output({"name": "y", "parameters": []}), r"outputs\[0\].parameters is an empty list"),
    (
        with_output({"name": "y", "parameters": {"binary_data": 1}}),
        r"outputs\[0\].parameters.binary_data is the number 1",
    ),
    (with_output(*[{"name": str(i)} for i in range(1025)]), "outputs has 1025 items"),
]


def as_body(sent: Any) -> bytes:
    return sent if isinstance(sent, bytes) else json.dumps(sent).encode()


@pytest.mark.parametrize(("sent", "message"), JSON_FAULTS)
def test_json_faults(sent: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=f"(?s){message}") as caught:
        decode_infer_request(as_body(sent))
    assert len(str(caught.value)) < 700


def test_there_are_enough_of_them() -> None:
    assert len(JSON_FAULTS) > 140


UNSUPPORTED: list[tuple[dict[str, Any], str]] = [
    (with_parameters(sequence_id=1), "parameters.sequence_id"),
    (with_parameters(sequence_id="a"), "parameters.sequence_id"),
    (with_parameters(sequence_start=True), "parameters.sequence_start"),
    (with_parameters(sequence_end=True), "parameters.sequence_end"),
    (
        one(data=..., parameters={"shared_memory_region": "r"}),
        r"inputs\[0\].parameters.shared_memory_region",
    ),
    (
        one(parameters={"shared_memory_byte_size": 8}),
        r"inputs\[0\].parameters.shared_memory_byte_size",
    ),
    (
        with_output({"name": "y", "parameters": {"shared_memory_region": "r"}}),
        r"outputs\[0\].parameters.shared_memory_region",
    ),
    (
        with_output({"name": "y", "parameters": {"classification": 2}}),
        r"outputs\[0\].parameters.classification",
    ),
]


@pytest.mark.parametrize(("sent", "message"), UNSUPPORTED)
def test_unsupported(sent: dict[str, Any], message: str) -> None:
    with pytest.raises(Unsupported, match=message):
        decode_infer_request(as_body(sent))


def binary(
    raw: bytes, datatype: str = "FP32", shape: Any = (2,), size: Any = 8
) -> tuple[bytes, int]:
    parameters = {"binary_data_size": size}
    text = as_body(one(datatype=datatype, shape=list(shape), data=..., parameters=parameters))
    return text + raw, len(text)


EIGHT = bytes(8)
ELEMENT = b"\x01\x00\x00\x00a"
BINARY_FAULTS: list[tuple[bytes, int, str]] = [
    (*binary(b""), "binary_data_size is the number 8, the body has 0 bytes left"),
    (*binary(bytes(7)), "the body has 7 bytes left"),
    (*binary(bytes(9)), "1 bytes are left over"),
    (*binary(EIGHT, size=7), "got 7 bytes, FP32 of shape .2. needs 8"),
    (*binary(EIGHT, size=0), "got 0 bytes"),
    (*binary(EIGHT, size=-1), "binary_data_size is the number -1"),
    (*binary(EIGHT, size=True), "binary_data_size is true"),
    (*binary(EIGHT, size="8"), "binary_data_size is the string '8'"),
    (*binary(EIGHT, size=8.0), "binary_data_size is the number 8.0"),
    (*binary(EIGHT, size=[8]), "binary_data_size is a list"),
    (*binary(EIGHT, size=10**18), "body has 8 bytes left"),
    (*binary(EIGHT, size=10**30), r"binary_data_size is the number 1e\+30"),
    (*binary(EIGHT, shape=[1]), "got 8 bytes, FP32 of shape .1. needs 4"),
    (*binary(EIGHT, shape=[0]), "got 8 bytes, FP32 of shape .0. needs 0"),
    (*binary(EIGHT, shape=[2**61]), "more elements than"),
    (*binary(EIGHT, shape=[2**40]), "needs 4398046511104"),
    (*binary(b"", shape=[0, 2**62], size=0), "more elements than"),
    (*binary(b"\x00\x02", "BOOL", [2], 2), "byte 1 is 2, allowed for BOOL are 0 and 1"),
    (*binary(b"\xff\x01", "BOOL", [2], 2), "byte 0 is 255"),
    (*binary(b"", "BYTES", [1], 0), "got 0 bytes, BYTES of shape .1. needs at least 4"),
    (*binary(ELEMENT[:3], "BYTES", [1], 3), "needs at least 4"),
    (*binary(ELEMENT[:4], "BYTES", [1], 4), "element 0 of BYTES says it has 1 bytes, 0 are left"),
    (*binary(ELEMENT * 2, "BYTES", [1], 10), "5 bytes are left over behind the 1 elements"),
    (*binary(ELEMENT, "BYTES", [0], 5), "5 bytes are left over behind the 0 elements"),
    (*binary(ELEMENT + b"\0\0\0", "BYTES", [2], 8), "element 1 of BYTES: 3 bytes are left"),
    (*binary(b"\xff\xff\xff\xff" + EIGHT, "BYTES", [1], 12), "says it has 4294967295 bytes"),
    (*binary(ELEMENT, "BYTES", [2**40], 5), "needs at least 4398046511104"),
    (as_body(one()), -1, "Inference-Header-Content-Length is -1"),
    (as_body(one()), 10**9, "Inference-Header-Content-Length is 1000000000"),
    (b"", 1, "in a body of 0 bytes"),
    (as_body(one()), 10, "malformed"),
    (as_body(one()) + b"tail", len(as_body(one())), "4 bytes are left over"),
    (EIGHT, 8, "malformed"),
    (
        as_body(one(parameters={"binary_data_size": 8})) + EIGHT,
        len(as_body(one(parameters={"binary_data_size": 8}))),
        "has both data and parameters.binary_data_size",
    ),
]


@pytest.mark.parametrize(("body", "length", "message"), BINARY_FAULTS)
@pytest.mark.parametrize("view", [bytes, memoryview])
def test_binary_faults(body: bytes, length: int, message: str, view: Any) -> None:
    with pytest.raises(InvalidInput, match=message):
        decode_infer_request(view(body), length)


def test_a_length_of_a_later_element_is_not_read_from_the_next_tensor() -> None:
    tensor = {"datatype": "BYTES", "shape": [2], "parameters": {"binary_data_size": 8}}
    text = as_body({"inputs": [{"name": "a", **tensor}, {"name": "b", **tensor}]})
    raw = bytes(4) + b"\x00\x00\x00" + b"\x00" + bytes(8)
    assert list(decode_infer_request(text + raw, len(text)).tensors) == ["a", "b"]
    raw = b"\x01\x00\x00\x00a" + b"\x00\x00\x00" + bytes(8)
    with pytest.raises(InvalidInput, match="element 1 of BYTES: 3 bytes are left"):
        decode_infer_request(text + raw, len(text))


def test_raw_binary_requests_are_unsupported() -> None:
    with pytest.raises(Unsupported, match="raw binary"):
        decode_infer_request(EIGHT, 0)


def test_empty_bodies_are_malformed_whatever_the_header() -> None:
    for length in (None, 0, 1, -5):
        with pytest.raises(RequestError):
            decode_infer_request(b"", length)
