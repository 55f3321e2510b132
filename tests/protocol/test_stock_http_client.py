"""What the stock HTTP client sends is understood, and it understands what we answer."""

from __future__ import annotations

import numpy as np
import pytest
import tritonclient.http as stock

from rayprism.core.tensors import Array, Datatype
from rayprism.errors import InvalidInput, Unsupported
from rayprism.protocol.http import decode_infer_request, encode_infer_response
from tests.protocol.tensors import SAMPLES, assert_same

Client = stock.InferenceServerClient


def stock_input(name: str, datatype: Datatype, array: Array, binary: bool) -> stock.InferInput:
    tensor = stock.InferInput(name, list(array.shape), datatype.value)
    return tensor.set_data_from_numpy(array, binary_data=binary)


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
@pytest.mark.parametrize("datatype", list(Datatype))
def test_requests_of_every_datatype(datatype: Datatype, binary: bool) -> None:
    if datatype is Datatype.BF16 and not binary:
        pytest.skip("the stock client does not send BF16 as JSON")
    array = SAMPLES[datatype]
    body, length = Client.generate_request_body([stock_input("x", datatype, array, binary)])
    request = decode_infer_request(body, length)
    assert_same(request.tensors["x"], array)
    assert request.binary_by_default  # it wants everything binary where it names no output
    assert request.parameters == {}


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
@pytest.mark.parametrize("datatype", list(Datatype))
def test_answers_of_every_datatype(datatype: Datatype, binary: bool) -> None:
    array = SAMPLES[datatype]
    sent = Client.generate_request_body(
        [stock_input("x", Datatype.FP32, SAMPLES[Datatype.FP32], True)],
        outputs=[stock.InferRequestedOutput("y", binary_data=binary)],
        request_id="r-1",
    )
    request = decode_infer_request(*sent)
    body, length = encode_infer_response("m", "3", request, {"other": np.zeros(1), "y": array})
    assert (length is not None) == binary
    result = Client.parse_response_body(body, header_length=length)
    assert [output["name"] for output in result.get_response()["outputs"]] == ["y"]
    assert result.get_response()["id"] == "r-1"
    assert result.get_response()["model_name"] == "m"
    assert result.get_response()["model_version"] == "3"
    got = result.as_numpy("y")
    if datatype is Datatype.BYTES and not binary:
        got = np.array([[value.encode() for value in got[0]]], np.object_)
    assert_same(got, array)


def test_binary_and_json_inputs_mix() -> None:
    arrays = {
        "a": np.arange(3, dtype=np.int8),
        "b": np.array([[1.5]]),
        "c": np.array([b"\xff"], "O"),
    }
    inputs = [
        stock_input("a", Datatype.INT8, arrays["a"], True),
        stock_input("b", Datatype.FP64, arrays["b"], False),
        stock_input("c", Datatype.BYTES, arrays["c"], True),
    ]
    request = decode_infer_request(*Client.generate_request_body(inputs))
    for name, array in arrays.items():
        assert_same(request.tensors[name], array)


def test_binary_and_json_outputs_mix() -> None:
    sent = Client.generate_request_body(
        [stock_input("x", Datatype.INT8, SAMPLES[Datatype.INT8], False)],
        outputs=[
            stock.InferRequestedOutput("c", binary_data=True),
            stock.InferRequestedOutput("a", binary_data=False),
            stock.InferRequestedOutput("b", binary_data=True),
        ],
    )
    request = decode_infer_request(*sent)
    outputs = {
        "a": np.array([1, 2], np.int32),
        "b": np.array([b"x", b"\xff\x00"], np.object_),
        "c": np.zeros((0, 4), np.float32),
    }
    body, length = encode_infer_response("m", "1", request, outputs)
    result = Client.parse_response_body(body, header_length=length)
    assert [o["name"] for o in result.get_response()["outputs"]] == ["c", "a", "b"]
    for name, array in outputs.items():
        assert_same(result.as_numpy(name), array)


def test_empty_tensors() -> None:
    array = np.zeros((0, 3), np.float32)
    body, length = Client.generate_request_body([stock_input("x", Datatype.FP32, array, True)])
    assert length == len(body)
    assert_same(decode_infer_request(body, length).tensors["x"], array)


def test_parameters_that_it_sends() -> None:
    body, length = Client.generate_request_body(
        [stock_input("x", Datatype.FP32, SAMPLES[Datatype.FP32], False)],
        request_id="7",
        priority=2,
        timeout=1_500_000,
        parameters={"tenant": "a", "share": 0.5, "dry": True, "n": 3},
    )
    request = decode_infer_request(body, length)
    assert request.id == "7"
    assert request.priority == 2
    assert request.timeout_s == 1.5
    assert request.parameters == {"tenant": "a", "share": 0.5, "dry": True, "n": 3}


@pytest.mark.parametrize("sequence_id", [1, "one"])
def test_sequences_are_unsupported(sequence_id: int | str) -> None:
    body, length = Client.generate_request_body(
        [stock_input("x", Datatype.FP32, SAMPLES[Datatype.FP32], False)], sequence_id=sequence_id
    )
    with pytest.raises(Unsupported, match="sequence"):
        decode_infer_request(body, length)


def test_extensions_on_tensors_are_unsupported() -> None:
    tensor = stock.InferInput("x", [1], "FP32").set_shared_memory("region", 4)
    with pytest.raises(Unsupported, match=r"inputs\[0\].parameters.shared_memory_region"):
        decode_infer_request(*Client.generate_request_body([tensor]))
    good = stock_input("x", Datatype.FP32, SAMPLES[Datatype.FP32], True)
    shared = stock.InferRequestedOutput("y")
    shared.set_shared_memory("region", 4)
    with pytest.raises(Unsupported, match=r"outputs\[0\].parameters.shared_memory_region"):
        decode_infer_request(*Client.generate_request_body([good], outputs=[shared]))
    classes = stock.InferRequestedOutput("y", class_count=3)
    with pytest.raises(Unsupported, match="classification"):
        decode_infer_request(*Client.generate_request_body([good], outputs=[classes]))


def test_nan_and_infinity_as_python_writes_them() -> None:
    body = (
        b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [4], '
        b'"data": [NaN, Infinity, -Infinity, null]}]}'
    )
    got = decode_infer_request(body).tensors["x"]
    assert_same(got, np.array([np.nan, np.inf, -np.inf, np.nan], np.float32))


def test_answer_in_json_refuses_what_json_cannot_hold() -> None:
    request = decode_infer_request(
        b'{"inputs": [{"name": "x", "datatype": "BOOL", "shape": [1], "data": [true]}]}'
    )
    with pytest.raises(InvalidInput, match="binary_data_output"):
        encode_infer_response("m", "1", request, {"y": np.array([b"\xff"], np.object_)})
