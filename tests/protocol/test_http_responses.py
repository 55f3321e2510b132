from __future__ import annotations

import ml_dtypes
import numpy as np
import orjson
import pytest

from rayprism.core.tensors import Array
from rayprism.errors import InvalidInput, ModelFailed
from rayprism.protocol.http import encode_infer_response
from rayprism.protocol.messages import InferRequest, RequestedOutput

PLAIN = InferRequest({})
BINARY = InferRequest({}, binary_by_default=True)


def answer(array: Array, request: InferRequest = PLAIN) -> dict[str, object]:
    body, length = encode_infer_response("m", "1", request, {"y": array})
    output: dict[str, object] = orjson.loads(body[:length])["outputs"][0]
    return output


def test_json_is_as_the_protocol_says() -> None:
    request = InferRequest({}, id="7")
    body, length = encode_infer_response(
        "flights", "3", request, {"y": np.array([[1.5, 2.0]], np.float32)}
    )
    assert length is None
    assert orjson.loads(body) == {
        "model_name": "flights",
        "model_version": "3",
        "id": "7",
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [1, 2], "data": [1.5, 2.0]}],
    }


def test_binary_is_as_the_protocol_says() -> None:
    outputs = {
        "a": np.array([[1, -1]], np.int16),
        "b": np.array([b"xy", b""], np.object_),
    }
    body, length = encode_infer_response("m", "1", BINARY, outputs)
    assert length is not None
    assert orjson.loads(body[:length])["outputs"] == [
        {"name": "a", "datatype": "INT16", "shape": [1, 2], "parameters": {"binary_data_size": 4}},
        {"name": "b", "datatype": "BYTES", "shape": [2], "parameters": {"binary_data_size": 10}},
    ]
    assert body[length:] == b"\x01\x00\xff\xff" + b"\x02\x00\x00\x00xy" + b"\x00\x00\x00\x00"


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_non_finite_values_become_null_and_the_output_says_so(dtype: type) -> None:
    output = answer(np.array([1, np.nan, np.inf, -np.inf]).astype(dtype))
    assert output["data"] == [1.0, None, None, None]
    assert output["parameters"] == {"non_finite_as_null": True}


def test_only_outputs_with_nulls_say_so() -> None:
    outputs = {"a": np.array([np.nan]), "b": np.array([1.0]), "c": np.array([b"null"], "O")}
    request = InferRequest(
        {}, outputs=(RequestedOutput("a"), RequestedOutput("b"), RequestedOutput("c", True))
    )
    body, length = encode_infer_response("null", "1", request, outputs)
    first, second, third = orjson.loads(body[:length])["outputs"]
    assert first["parameters"] == {"non_finite_as_null": True}
    assert "parameters" not in second
    assert third["parameters"] == {"binary_data_size": 8}


def test_binary_keeps_non_finite_values() -> None:
    array = np.array([np.nan, np.inf], np.float32)
    body, length = encode_infer_response("m", "1", BINARY, {"y": array})
    assert body[length:] == array.tobytes()


@pytest.mark.parametrize("request_", [PLAIN, BINARY], ids=["json", "binary"])
@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.float32).reshape(2, 3).T,
        np.arange(12, dtype=np.int64).reshape(3, 4)[:, ::2],
        np.arange(4, dtype=">i4").reshape(2, 2),
        np.arange(3, dtype=">f8")[::-1],
        np.array(5, np.uint8),
        np.broadcast_to(np.float32(1), (2, 2)),
        np.array([["a", "é"]]),
        np.array([b"a", b"bc"]),
        np.asfortranarray(np.array([["a", "b"], ["c", "d"]], np.object_)),
    ],
)
def test_arrays_as_models_return_them(array: Array, request_: InferRequest) -> None:
    body, length = encode_infer_response("m", "1", request_, {"y": array})
    output = orjson.loads(body[:length])["outputs"][0]
    assert output["shape"] == list(array.shape)
    if length is None:
        want = [v.decode() if isinstance(v, bytes) else v for v in array.ravel().tolist()]
        assert output["data"] == want
    elif array.dtype.kind not in "OSU":
        native = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("="))
        assert body[length:] == native.tobytes()


def test_large_outputs() -> None:
    for dtype in (np.float32, ml_dtypes.bfloat16, np.bool_):
        array = np.arange(200_000).reshape(2, -1).astype(dtype)
        body, length = encode_infer_response("m", "1", BINARY, {"y": array})
        assert body[length:] == array.tobytes()
        sizes = orjson.loads(body[:length])["outputs"][0]["parameters"]
        assert sizes == {"binary_data_size": array.nbytes}


@pytest.mark.parametrize(
    "array",
    [
        np.array([1j]),
        np.array(["2020-01-01"], "datetime64[D]"),
        np.array([None], np.object_),
        np.array([1], np.object_),
        np.array([["a"], 2.5], np.object_),
        np.array(["\ud800"], np.object_),
        np.array(["\ud800"]),
    ],
    ids=["complex", "date", "none", "number", "nested", "surrogate", "surrogate array"],
)
@pytest.mark.parametrize("request_", [PLAIN, BINARY], ids=["json", "binary"])
def test_what_the_protocol_cannot_carry_is_the_models_fault(
    array: Array, request_: InferRequest
) -> None:
    with pytest.raises(ModelFailed, match="output 'y'"):
        encode_infer_response("m", "1", request_, {"y": array})


def test_outputs_come_in_the_order_they_are_wanted() -> None:
    request = InferRequest({}, outputs=(RequestedOutput("b"), RequestedOutput("a")))
    outputs = {"a": np.zeros(1), "b": np.ones(1), "c": np.ones(1)}
    body, _ = encode_infer_response("m", "1", request, outputs)
    assert [output["name"] for output in orjson.loads(body)["outputs"]] == ["b", "a"]


def test_a_wanted_output_that_is_not_there() -> None:
    request = InferRequest({}, outputs=(RequestedOutput("z"),))
    with pytest.raises(InvalidInput, match="'z'"):
        encode_infer_response("m", "1", request, {"y": np.zeros(1)})
