"""Answers read back, and the timeout of a request read without its tensors."""

from __future__ import annotations

import contextlib
import json
import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayprism.core.tensors import Array, Datatype, datatype_of
from rayprism.errors import InvalidInput, RequestError
from rayprism.protocol import http
from rayprism.protocol.grpc import (
    InferParameter,
    ModelInferRequest,
    ModelInferResponse,
    decode_infer_request_grpc,
    decode_infer_response_grpc,
    encode_infer_response_grpc,
    parse_infer_response,
    request_timeout_s_grpc,
)
from rayprism.protocol.http import (
    decode_infer_request,
    decode_infer_response,
    encode_infer_response,
    request_timeout_s,
)
from rayprism.protocol.messages import InferRequest, InferResponse, RequestedOutput
from tests.protocol.tensors import SAMPLES, arrays, assert_same
from tests.protocol.test_fuzz import anything
from tests.protocol.test_roundtrip import CONTENTS

laws = settings(deadline=None, max_examples=100)
fuzz = settings(deadline=None, max_examples=250)

ids = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)


def named(made: list[Array]) -> dict[str, Array]:
    return {f"output {index}": array for index, array in enumerate(made)}


def assert_answers(got: InferResponse, outputs: dict[str, Array]) -> None:
    assert list(got.outputs) == list(outputs)
    for name, array in outputs.items():
        assert_same(got.outputs[name], array)


def through_json(array: Array) -> Array:
    """JSON knows NaN only, as null; and BYTES that are UTF-8."""
    if not datatype_of(array).is_float:
        return array
    return np.where(np.isfinite(array), array, np.full((), np.nan, array.dtype))


@laws
@given(st.lists(arrays(), max_size=3), ids, st.data())
def test_http_json_and_binary_mixed(made: list[Array], id_: str, data: st.DataObject) -> None:
    outputs = named(made)
    wanted, expected = [], {}
    for name in data.draw(st.permutations(list(outputs))):
        array = outputs[name]
        only_binary = any(
            not _is_text(value) for value in array.flat if datatype_of(array) is Datatype.BYTES
        )
        binary = only_binary or data.draw(st.booleans())
        wanted.append(RequestedOutput(name, binary))
        expected[name] = array if binary else through_json(array)
    request = InferRequest({}, id=id_, outputs=tuple(wanted))
    got = decode_infer_response(*encode_infer_response("flights", "4", request, outputs))
    assert (got.model, got.version, got.id) == ("flights", "4", id_)
    assert_answers(got, expected)


def _is_text(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


@laws
@given(st.lists(arrays(), max_size=3))
def test_http_binary(made: list[Array]) -> None:
    outputs = named(made)
    request = InferRequest({}, binary_by_default=True)
    body, length = encode_infer_response("m", "1", request, outputs)
    got = decode_infer_response(memoryview(body), length)
    assert_answers(got, outputs)
    assert all(array.flags.aligned for array in got.outputs.values())


@laws
@given(st.lists(arrays(), max_size=3), ids)
def test_grpc_raw(made: list[Array], id_: str) -> None:
    outputs = named(made)
    sent = encode_infer_response_grpc("flights", "4", InferRequest({}, id=id_), outputs)
    got = decode_infer_response_grpc(parse_infer_response(sent.SerializeToString()))
    assert (got.model, got.version, got.id) == ("flights", "4", id_)
    assert_answers(got, outputs)


@laws
@given(st.lists(arrays().filter(lambda array: datatype_of(array) in CONTENTS), max_size=3))
def test_grpc_typed_contents(made: list[Array]) -> None:
    outputs = named(made)
    sent = ModelInferResponse(model_name="m", model_version="1")
    for name, array in outputs.items():
        datatype = datatype_of(array)
        contents: dict[str, Any] = {f"{CONTENTS[datatype]}_contents": array.ravel().tolist()}
        sent.outputs.add(name=name, datatype=datatype, shape=array.shape, contents=contents)
    got = decode_infer_response_grpc(parse_infer_response(sent.SerializeToString()))
    assert_answers(got, outputs)


@pytest.mark.parametrize("datatype", list(Datatype))
@pytest.mark.parametrize("binary", [False, True], ids=["json", "binary"])
def test_http_at_the_limits_of_every_datatype(datatype: Datatype, binary: bool) -> None:
    outputs = {"y": SAMPLES[datatype]}
    request = InferRequest({}, binary_by_default=binary)
    assert_answers(
        decode_infer_response(*encode_infer_response("m", "1", request, outputs)), outputs
    )


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_what_json_cannot_hold_is_nan_and_binary_keeps_it(dtype: type) -> None:
    array = np.array([1.5, np.nan, np.inf, -np.inf]).astype(dtype)
    for binary, values in ((False, [1.5] + [math.nan] * 3), (True, array.tolist())):
        request = InferRequest({}, binary_by_default=binary)
        body, length = encode_infer_response("m", "1", request, {"y": array})
        assert (b"non_finite_as_null" in body) is not binary
        got = decode_infer_response(body, length).outputs["y"]
        assert_same(got, np.array(values).astype(dtype))


def test_strings_of_a_model_come_back_as_bytes() -> None:
    names = np.array([["ä", "b"]])
    for binary in (False, True):
        request = InferRequest({}, binary_by_default=binary)
        got = decode_infer_response(*encode_infer_response("m", "1", request, {"y": names}))
        assert got.outputs["y"].tolist() == [["ä".encode(), b"b"]]


def test_large_binary_outputs_are_views() -> None:
    outputs = {"y": np.arange(40_000, dtype=np.float32)}
    request = InferRequest({}, id="1234", binary_by_default=True)
    body, length = encode_infer_response("m", "12", request, outputs)
    assert length is not None
    padded = b" " * (-length % 4) + body  # so that the tensor lies at a multiple of its size
    got = decode_infer_response(padded, length + -length % 4).outputs["y"]
    assert got.base is not None
    assert_same(got, outputs["y"])


def test_an_answer_need_not_say_its_version_or_id() -> None:
    for more in ({}, {"model_version": None, "id": None}):
        body = json.dumps({"model_name": "m", "outputs": [], **more}).encode()
        assert decode_infer_response(body) == InferResponse("m", "", "", {})
    answer = ModelInferResponse(model_name="m")
    assert decode_infer_response_grpc(answer) == InferResponse("m", "", "", {})


Y: dict[str, Any] = {"name": "y", "datatype": "FP32", "shape": [2], "data": [1.0, 2.0]}


def with_top(**more: Any) -> dict[str, Any]:
    """An answer with other values at its top; `...` leaves a key out."""
    whole = {"model_name": "m", "model_version": "1", "outputs": [Y], **more}
    return {key: value for key, value in whole.items() if value is not ...}


def with_output(**more: Any) -> dict[str, Any]:
    whole = {**Y, **more}
    return with_top(outputs=[{key: value for key, value in whole.items() if value is not ...}])


def shared(**more: Any) -> dict[str, Any]:
    return with_output(data=..., parameters={"shared_memory_region": "r", **more})


# What came (bytes as they are, all else as JSON), and what the message has to say.
JSON_FAULTS: list[tuple[Any, str]] = [
    (b"", "body is empty"),
    (b"Internal Server Error", "JSON is malformed"),
    (b"\xff", "not UTF-8"),
    ([], "body is an empty list"),
    ({"error": "it broke"}, "model_name is missing"),
    (with_top(model_name=""), "model_name is missing"),
    (with_top(model_name=0), "model_name is the number 0"),
    (with_top(model_version=4), "model_version is the number 4"),
    (with_top(id=7), "id is the number 7"),
    (with_top(outputs=...), "outputs is missing, allowed is a list of tensors"),
    (with_top(outputs={}), "outputs is an object"),
    (with_top(outputs=[1]), r"outputs\[0\] is the number 1"),
    (with_top(outputs=[Y, Y]), r"outputs\[1\].name is 'y' again"),
    (with_top(outputs=[Y] * 1025), "outputs has 1025 items"),
    (with_output(name=...), r"outputs\[0\].name is missing"),
    (with_output(datatype="FP3"), r"outputs\[0\].datatype .* Did you mean 'FP32'"),
    (with_output(shape=[-1]), r"outputs\[0\].shape\[0\] is the number -1"),
    (with_output(shape=[2**62, 4]), "more elements than"),
    (with_output(shape=[3]), "^output 'y': got 2 values, shape .3. needs 3"),
    (with_output(data=...), r"outputs\[0\].data is missing"),
    (with_output(data=["1", "2"]), "^output 'y': value 0 is the string '1'"),
    (with_output(datatype="INT8", data=[1, None]), "^output 'y': value 1 is null"),
    (with_output(datatype="INT8", data=[1, 128]), "^output 'y': value 1 .* out of range"),
    (with_output(parameters=[]), r"outputs\[0\].parameters is an empty list"),
    (with_output(data=..., parameters={"binary_data_size": 8}), "needs the header"),
    (with_output(parameters={"binary_data_size": 8}), "both data and"),
    (shared(), r"outputs\[0\].parameters.shared_memory_region.*send the tensor itself"),
]


@pytest.mark.parametrize(("sent", "fault"), JSON_FAULTS)
def test_malformed_json(sent: Any, fault: str) -> None:
    body = sent if isinstance(sent, bytes) else json.dumps(sent).encode()
    with pytest.raises(InvalidInput, match=fault) as caught:
        decode_infer_response(body)
    assert "input" not in str(caught.value)


BINARY = json.dumps(with_output(data=..., parameters={"binary_data_size": 8})).encode()


@pytest.mark.parametrize(
    ("body", "length", "fault"),
    [
        (BINARY + bytes(7), len(BINARY), "the body has 7 bytes left"),
        (BINARY + bytes(9), len(BINARY), "1 bytes are left over behind the outputs' binary"),
        (BINARY + bytes(8), 0, "Content-Length is 0"),
        (BINARY + bytes(8), -1, "Content-Length is -1"),
        (BINARY + bytes(8), len(BINARY) + 9, "allowed is the length of the JSON"),
        (BINARY + bytes(8), len(BINARY) - 1, "JSON is malformed"),
        (BINARY + bytes(8), None, "Binary tensors behind JSON need the header"),
        (BINARY.replace(b"FP32", b"BOOL"), len(BINARY), "the body has 0 bytes"),
        (BINARY.replace(b"[2]", b"[3]") + bytes(8), len(BINARY), "^output 'y': got 8 bytes"),
        (BINARY.replace(b"FP32", b"INT8") + bytes(8), len(BINARY), "^output 'y': got 8 bytes"),
    ],
)
def test_malformed_binary(body: bytes, length: int | None, fault: str) -> None:
    with pytest.raises(InvalidInput, match=fault) as caught:
        decode_infer_response(body, length)
    assert "input" not in str(caught.value)


def grpc_answer(*outputs: dict[str, Any], **more: Any) -> Any:
    return ModelInferResponse(**{"model_name": "m", **more}, outputs=outputs)


Z: dict[str, Any] = {"name": "z", "datatype": "INT8", "shape": [2]}
TYPED = {**Z, "contents": {"int_contents": [1, 2]}}

GRPC_FAULTS: list[tuple[Any, str]] = [
    (ModelInferResponse(), "model_name is missing"),
    (grpc_answer(id="x" * 2000), "id has 2000 characters"),
    (grpc_answer(*[{**Z, "name": str(i)} for i in range(1025)]), "outputs has 1025 items"),
    (grpc_answer({**Z, "name": ""}), r"outputs\[0\].name has 0 characters"),
    (grpc_answer(TYPED, TYPED), r"outputs\[1\].name is 'z' again"),
    (grpc_answer({**Z, "datatype": "INT9"}), r"outputs\[0\].datatype"),
    (grpc_answer({**Z, "shape": [-1]}), r"outputs\[0\].shape\[0\] is the number -1"),
    (grpc_answer(Z), "^output 'z': got 0 values in int_contents"),
    (grpc_answer({**TYPED, "datatype": "FP16"}), "^output 'z': FP16 .*raw_output_contents"),
    (grpc_answer({**TYPED, "datatype": "FP32"}), "allowed for FP32 is fp32_contents"),
    (grpc_answer({**Z, "contents": {"int_contents": [1, 128]}}), "^output 'z': value 1 is 128"),
    (grpc_answer(Z, raw_output_contents=[b"abc"]), "^output 'z': got 3 bytes"),
    (grpc_answer(Z, raw_output_contents=[b"ab", b""]), "raw_output_contents has 2 entries"),
    (grpc_answer(raw_output_contents=[b"ab"]), "raw_output_contents has 1 entries"),
    (
        grpc_answer(Z, {**Z, "name": "y"}, raw_output_contents=[b"ab"]),
        r"raw_output_contents has 1 entries, none for outputs\[1\] \('y'\)",
    ),
    (
        grpc_answer(TYPED, raw_output_contents=[b"ab"]),
        r"outputs\[0\].contents is given, and so is raw_output_contents",
    ),
    (
        grpc_answer({**Z, "parameters": {"shared_memory_region": {"string_param": "r"}}}),
        r"outputs\[0\].parameters.shared_memory_region",
    ),
]


@pytest.mark.parametrize(("sent", "fault"), GRPC_FAULTS)
def test_malformed_messages(sent: Any, fault: str) -> None:
    with pytest.raises(InvalidInput, match=fault) as caught:
        decode_infer_response_grpc(sent)
    assert "input" not in str(caught.value)


def test_bytes_that_are_no_message() -> None:
    with pytest.raises(InvalidInput, match="3 bytes are not a ModelInferResponse"):
        parse_infer_response(b"\xff\xff\xff")


JSON_ANSWER, _ = encode_infer_response(
    "m", "1", InferRequest({}, id="7"), {"a": np.array([1.5, np.nan]), "b": np.array(["x"])}
)
MIXED_ANSWER, MIXED_LENGTH = encode_infer_response(
    "m",
    "1",
    InferRequest({}, outputs=(RequestedOutput("a"), RequestedOutput("b", True))),
    {"a": np.array([True, False]), "b": np.array([b"xy", b""], np.object_)},
)
GRPC_ANSWER = encode_infer_response_grpc(
    "m", "1", InferRequest({}), {"a": np.arange(3), "b": np.array([b"xy"], np.object_)}
).SerializeToString()

changes = st.lists(st.tuples(st.integers(0, 999), st.integers(0, 255)), max_size=4)


def damaged(body: bytes, at: list[tuple[int, int]], cut: int) -> bytes:
    changed = bytearray(body)
    for position, value in at:
        changed[position % len(changed)] = value
    return bytes(changed[: len(changed) - cut])


@fuzz
@given(changes, st.integers(0, 12), st.integers(-3, 3))
def test_whatever_bytes_come_only_invalid_input_comes_out(
    at: list[tuple[int, int]], cut: int, shift: int
) -> None:
    assert MIXED_LENGTH is not None
    with contextlib.suppress(InvalidInput):
        decode_infer_response(damaged(JSON_ANSWER, at, cut))
    with contextlib.suppress(InvalidInput):
        decode_infer_response(damaged(MIXED_ANSWER, at, cut), MIXED_LENGTH + shift)
    with contextlib.suppress(InvalidInput):
        decode_infer_response_grpc(parse_infer_response(damaged(GRPC_ANSWER, at, cut)))


@fuzz
@given(
    st.sampled_from(["model_name", "model_version", "id", "outputs"]),
    st.sampled_from(["name", "datatype", "shape", "data", "parameters"]),
    anything,
)
def test_whatever_values_come_only_invalid_input_comes_out(top: str, key: str, value: Any) -> None:
    for document in (value, with_top(**{top: value}), with_output(**{key: value})):
        with contextlib.suppress(InvalidInput):
            decode_infer_response(json.dumps(document).encode())


# What the parameter is, and the seconds that it means.
TIMEOUTS: list[tuple[Any, float | None]] = [
    (1_500_000, 1.5),
    (1, 1e-6),
    (2**63 - 1, (2**63 - 1) / 1e6),
    (0, None),
    (-1, None),
    (2**63, None),
    (1.0, None),
    ("5", None),
    (True, None),
    (None, None),
    ([5], None),
]
INPUT = {"name": "x", "datatype": "INT8", "shape": [1], "data": [1]}


@pytest.mark.parametrize(("value", "seconds"), TIMEOUTS)
def test_timeout_of_a_request(value: Any, seconds: float | None) -> None:
    text = json.dumps({"parameters": {"a": 1, "timeout": value}, "inputs": [INPUT]}).encode()
    assert request_timeout_s(text, None) == seconds
    tensor = {"name": "x", "datatype": "INT8", "shape": [1], "parameters": {"binary_data_size": 1}}
    text = json.dumps({"parameters": {"timeout": value}, "inputs": [tensor]}).encode()
    assert request_timeout_s(text + b"\x01", len(text)) == seconds


@fuzz
@given(anything | st.integers(0, 2**64))
def test_timeout_is_what_the_decoder_says(value: Any) -> None:
    body = json.dumps({"parameters": {"timeout": value}, "inputs": [INPUT]}).encode()
    try:
        expected = decode_infer_request(body).timeout_s
    except RequestError:
        expected = None
    assert request_timeout_s(body, None) == expected


def test_a_request_without_a_timeout_is_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("parsed")

    monkeypatch.setattr(http, "parse_body", refuse)
    text = json.dumps({"inputs": [INPUT], "parameters": {"priority": 1}}).encode()
    assert request_timeout_s(text, None) is None
    # A tensor may hold any bytes: they are none of the JSON.
    assert request_timeout_s(text + b'"timeout"', len(text)) is None
    with pytest.raises(AssertionError, match="parsed"):
        request_timeout_s(text + b'"timeout"', None)


@pytest.mark.parametrize(
    ("body", "length"),
    [
        (b"", None),
        (b'"timeout"', None),
        (b'{"timeout": 5}', None),
        (b'{"parameters": {"timeout": 5}', None),
        (b'{"parameters": {"timeout": 5}}', 99),
        (b'{"parameters": {"timeout": 5}}', 0),
        (b'{"parameters": {"timeout": 5}}{}', -2),
        (b'{"parameters": ["timeout", 5]}', None),
        (b'{"parameters": "timeout"}', None),
        (b'{"parameters": {"x": {"timeout": 5}}}', None),
        (b'{"inputs": [{"parameters": {"timeout": 5}}]}', None),
        (b'{"timeout": ' + b"[" * 100_000, None),
    ],
)
def test_a_request_with_a_fault_has_no_timeout(body: bytes, length: int | None) -> None:
    assert request_timeout_s(body, length) is None


@pytest.mark.parametrize(
    ("choice", "seconds"),
    [
        ({"int64_param": 1_500_000}, 1.5),
        ({"uint64_param": 20}, 2e-5),
        ({"uint64_param": 2**64 - 1}, None),
        ({"int64_param": 0}, None),
        ({"int64_param": -1}, None),
        ({"double_param": 1.0}, None),
        ({"string_param": "1"}, None),
        ({"bool_param": True}, None),
        ({}, None),
    ],
)
def test_timeout_of_a_message(choice: dict[str, Any], seconds: float | None) -> None:
    message = ModelInferRequest()
    message.parameters["timeout"].CopyFrom(InferParameter(**choice))
    message.inputs.add(name="x", datatype="INT8", shape=[1], contents={"int_contents": [1]})
    assert request_timeout_s_grpc(message) == seconds
    with contextlib.suppress(RequestError):
        assert decode_infer_request_grpc(message).timeout_s == seconds


def test_asking_a_message_for_its_timeout_changes_nothing() -> None:
    message = ModelInferRequest(model_name="m")
    before = message.SerializeToString()
    assert request_timeout_s_grpc(message) is None
    assert message.SerializeToString() == before
