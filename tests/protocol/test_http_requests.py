"""What well-formed requests mean, and that their tensors are not copied."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from rayprism.core.tensors import Datatype
from rayprism.errors import InvalidInput
from rayprism.protocol.http import decode_infer_request, select_outputs
from rayprism.protocol.messages import InferRequest, RequestedOutput
from tests.protocol.tensors import SAMPLES, assert_same

X = {"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2.5]}


def body(**top: Any) -> bytes:
    return json.dumps({"inputs": [X], **top}).encode()


def test_the_least_that_a_request_needs() -> None:
    request = decode_infer_request(body())
    assert_same(request.tensors["x"], np.array([[1, 2.5]], np.float32))
    del request.tensors["x"]
    assert request == InferRequest({})


def test_everything_that_a_request_may_have() -> None:
    request = decode_infer_request(
        body(
            id="é",
            parameters={"timeout": 250_000, "priority": 1, "binary_data_output": True, "a": 1},
            outputs=[{"name": "y"}, {"name": "z", "parameters": {"binary_data": False, "b": 2}}],
            model_name="passed over",
        )
    )
    assert request.id == "é"
    assert request.timeout_s == 0.25
    assert request.priority == 1
    assert request.parameters == {"a": 1}
    assert request.outputs == (RequestedOutput("y", True), RequestedOutput("z", False))


@pytest.mark.parametrize("key", ["id", "outputs", "parameters"])
def test_null_stands_for_absent(key: str) -> None:
    request = decode_infer_request(body(**{key: None}))
    del request.tensors["x"]
    assert request == InferRequest({})


def test_a_timeout_of_zero_is_none() -> None:
    request = decode_infer_request(body(parameters={"timeout": 0, "priority": 0}))
    assert request.timeout_s is None
    assert request.priority == 0


def test_a_sequence_of_zero_is_none() -> None:
    parameters = {"sequence_id": 0, "sequence_start": False, "sequence_end": False}
    assert decode_infer_request(body(parameters=parameters)).parameters == {}


def test_nested_data_and_scalars() -> None:
    inputs = [
        {"name": "a", "datatype": "INT8", "shape": [2, 1, 2], "data": [[[1, 2]], [[3, 4]]]},
        {"name": "b", "datatype": "BYTES", "shape": [1, 1], "data": [["é"]]},
        {"name": "c", "datatype": "FP64", "shape": [], "data": [7]},
        {"name": "d", "datatype": "BOOL", "shape": [2, 0], "data": [[], []]},
        {"name": "e", "datatype": "BF16", "shape": [0], "data": []},
        {"name": "f", "datatype": "FP16", "shape": [2], "data": [None, 65519]},
    ]
    tensors = decode_infer_request(json.dumps({"inputs": inputs}).encode()).tensors
    assert_same(tensors["a"], np.array([[[1, 2]], [[3, 4]]], np.int8))
    assert_same(tensors["b"], np.array([["é".encode()]], np.object_))
    assert_same(tensors["c"], np.array(7.0))
    assert_same(tensors["d"], np.zeros((2, 0), np.bool_))
    assert tensors["e"].shape == (0,)
    assert_same(tensors["f"], np.array([np.nan, 65504], np.float16))


def binary_body(datatype: Datatype, align: int) -> tuple[bytes, int]:
    """A request whose tensor starts `align` bytes behind a multiple of 8."""
    array = SAMPLES[datatype]
    raw = array.tobytes()
    tensor = {
        "name": "x",
        "datatype": datatype,
        "shape": list(array.shape),
        "parameters": {"binary_data_size": len(raw)},
    }
    text = json.dumps({"inputs": [tensor]}).encode()
    # A bytes object's data starts at a multiple of 8, but for the header of the object itself.
    base = np.frombuffer(b"x" * 64, np.uint8).__array_interface__["data"][0] % 8
    text += b" " * ((align - base - len(text)) % 8)
    return text + raw, len(text)


@pytest.mark.parametrize("datatype", [d for d in Datatype if d is not Datatype.BYTES])
@pytest.mark.parametrize("view", [bytes, memoryview])
def test_aligned_binary_tensors_are_views(datatype: Datatype, view: Any) -> None:
    sent, length = binary_body(datatype, 0)
    array = decode_infer_request(view(sent), length).tensors["x"]
    assert_same(array, SAMPLES[datatype])
    assert np.shares_memory(array, np.frombuffer(sent, np.uint8))
    assert not array.flags.writeable


@pytest.mark.parametrize("datatype", [Datatype.FP64, Datatype.FP32, Datatype.INT16, Datatype.BF16])
def test_unaligned_binary_tensors_are_copied(datatype: Datatype) -> None:
    sent, length = binary_body(datatype, 1)
    array = decode_infer_request(sent, length).tensors["x"]
    assert_same(array, SAMPLES[datatype])
    assert array.flags.aligned
    assert not np.shares_memory(array, np.frombuffer(sent, np.uint8))


def test_select_outputs() -> None:
    known = ["label", "scores"]
    assert select_outputs(InferRequest({}), known) == known
    wanted = InferRequest({}, outputs=(RequestedOutput("scores"), RequestedOutput("label")))
    assert select_outputs(wanted, known) == ["scores", "label"]
    unknown = InferRequest({}, outputs=(RequestedOutput("score"),))
    with pytest.raises(
        InvalidInput, match=r"'score'.*Did you mean 'scores'\? Its outputs: label, scores"
    ):
        select_outputs(unknown, known)
