"""Bodies of requests as servers read them, and answers as they come."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from bench import tiny_model
from bench.models.bodies import (
    AnswerInvalid,
    Body,
    RowsInvalid,
    SignatureInvalid,
    decode,
    encode,
    from_rows_file,
    from_signature,
)
from rayprism.core.tensors import Datatype, Tensors, numpy_dtype
from rayprism.protocol.grpc import (
    ModelInferRequest,
    decode_infer_request_grpc,
    encode_infer_response_grpc,
)
from rayprism.protocol.http import decode_infer_request, encode_infer_response
from rayprism.protocol.messages import InferRequest, RequestedOutput

KINDS = ["json", "binary", "grpc"]


def words(*texts: str) -> Any:
    return np.array([text.encode() for text in texts], object)


def as_server_reads(body: Body, kind: str) -> InferRequest:
    if kind == "grpc":
        return decode_infer_request_grpc(ModelInferRequest.FromString(body.content))
    length = dict(body.headers).get("inference-header-content-length")
    return decode_infer_request(body.content, None if length is None else int(length))


def same(one: Tensors, other: Tensors) -> bool:
    return list(one) == list(other) and all(
        array.dtype == other[name].dtype
        and array.shape == other[name].shape
        and array.tolist() == other[name].tolist()
        for name, array in one.items()
    )


def every_datatype() -> Tensors:
    random = np.random.default_rng(3)
    tensors: Tensors = {}
    for datatype in Datatype:
        dtype = numpy_dtype(datatype)
        if datatype is Datatype.BYTES:
            tensors[datatype] = words("one", "", "ünï\u2028", '"\n').reshape(2, 2)
        elif datatype is Datatype.BOOL:
            tensors[datatype] = np.array([[True, False], [False, True]])
        elif datatype.is_float:
            tensors[datatype] = random.normal(size=(2, 2)).astype(dtype)
        else:
            limits = np.iinfo(dtype)
            tensors[datatype] = np.array([[limits.min, 0], [1, limits.max]], dtype)
    return tensors


@pytest.mark.parametrize("kind", KINDS)
def test_the_server_reads_what_was_written(kind: Any) -> None:
    tensors = every_datatype()
    request = as_server_reads(encode("model", tensors, kind), kind)
    assert same(request.tensors, tensors)
    assert request.outputs == (), "all outputs"
    assert request.binary_by_default == (kind == "binary"), "binary answers to binary requests"


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_that_lie_otherwise_in_memory_are_sent_in_their_order(kind: Any) -> None:
    tensors = {"x": np.arange(6, dtype=np.float32).reshape(2, 3).T, "y": np.arange(9)[::3]}
    assert same(as_server_reads(encode("model", tensors, kind), kind).tensors, tensors)


def test_each_kind_says_what_it_is() -> None:
    tensors = {"x": np.ones((1, 2), np.float32)}
    assert dict(encode("m", tensors, "json").headers) == {"content-type": "application/json"}
    binary = encode("m", tensors, "binary")
    headers = dict(binary.headers)
    assert headers["content-type"] == "application/octet-stream"
    length = int(headers["inference-header-content-length"])
    assert binary.content[length:] == tensors["x"].tobytes()
    grpc = encode("m", tensors, "grpc")
    assert grpc.headers == ()
    message = service_pb2.ModelInferRequest.FromString(grpc.content)
    assert (message.model_name, message.raw_input_contents) == ("m", [tensors["x"].tobytes()])
    assert not message.inputs[0].HasField("contents")


def test_json_is_what_was_measured_before() -> None:
    body = encode("tiny", {tiny_model.INPUT: tiny_model.sample_row()}, "json")
    assert body.content == tiny_model.infer_body()


def test_json_cannot_carry_every_byte() -> None:
    tensors = {"x": np.array([b"\xff"], object)}
    with pytest.raises(ValueError, match="utf-8"):
        encode("m", tensors, "json")
    assert same(as_server_reads(encode("m", tensors, "binary"), "binary").tensors, tensors)


def answer(outputs: Tensors, kind: str) -> tuple[dict[str, str], bytes]:
    request = InferRequest({})
    if kind == "grpc":
        message = encode_infer_response_grpc("m", "1", request, outputs)
        return {}, message.SerializeToString()
    request.outputs = tuple(RequestedOutput(name, kind == "binary") for name in outputs)
    body, length = encode_infer_response("m", "1", request, outputs)
    return {} if length is None else {"Inference-Header-Content-Length": str(length)}, body


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_read(kind: Any) -> None:
    outputs = every_datatype()
    headers, body = answer(outputs, kind)
    assert same(decode(kind, headers, body), outputs)
    assert same(decode(kind, list(headers.items()), body), outputs), "headers as pairs"


def test_a_server_may_answer_a_binary_request_in_json() -> None:
    outputs = {"y": np.ones((2, 1), np.float32)}
    assert same(decode("binary", {}, answer(outputs, "json")[1]), outputs)


def test_nested_json_is_read() -> None:
    output = {"name": "y", "datatype": "INT64", "shape": [2, 2], "data": [[1, 2], [3, 4]]}
    body = json.dumps({"model_name": "m", "outputs": [output]}).encode()
    assert same(decode("json", {}, body), {"y": np.array([[1, 2], [3, 4]])})


def test_typed_contents_of_grpc_are_read() -> None:
    message = service_pb2.ModelInferResponse(model_name="m")
    for name, datatype, field, values in (
        ("a", "FP32", "fp32_contents", [0.5, 1.5]),
        ("b", "INT64", "int64_contents", [1, 2]),
        ("c", "BYTES", "bytes_contents", [b"one", b"two"]),
        ("d", "UINT8", "uint_contents", [0, 255]),
        ("e", "BOOL", "bool_contents", [True, False]),
    ):
        output = message.outputs.add(name=name, datatype=datatype, shape=[2, 1])
        getattr(output.contents, field).extend(values)
    expected = {
        "a": np.array([[0.5], [1.5]], np.float32),
        "b": np.array([[1], [2]]),
        "c": words("one", "two").reshape(2, 1),
        "d": np.array([[0], [255]], np.uint8),
        "e": np.array([[True], [False]]),
    }
    assert same(decode("grpc", {}, message.SerializeToString()), expected)


@pytest.mark.parametrize(
    ("kind", "headers", "body"),
    [
        ("json", {}, b""),
        ("json", {}, b"<html>"),
        ("json", {}, b'{"error": "overloaded"}'),
        ("json", {}, b'{"outputs": [{"name": "y", "datatype": "FP32", "shape": [2]}]}'),
        (
            "json",
            {},
            b'{"outputs": [{"name": "y", "datatype": "FP32", "shape": [2], "data": [1]}]}',
        ),
        ("binary", {"Inference-Header-Content-Length": "many"}, b"{}"),
        ("binary", {"Inference-Header-Content-Length": "9000"}, b'{"outputs": [{'),
        ("grpc", {}, b"\xff\xff"),
    ],
)
def test_what_is_no_answer_is_told(kind: Any, headers: dict[str, str], body: bytes) -> None:
    with pytest.raises(AnswerInvalid, match="no answer to an inference request"):
        decode(kind, headers, body)


SIGNATURE = {
    "name": "m",
    "inputs": [
        {"name": "x", "datatype": "FP32", "shape": [-1, 2]},
        {"name": "city", "datatype": "BYTES", "shape": [-1, 1]},
        {"name": "word", "datatype": "BYTES", "shape": [-1]},
    ],
}


def rows_file(folder: Path, *rows: Any) -> Path:
    path = folder / "rows.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def row(x: Any, word: Any = "a", city: Any = "JFK") -> dict[str, Any]:
    return {"x": x, "word": word, "city": city}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_file_are_sent_in_their_order(kind: Any, tmp_path: Path) -> None:
    path = rows_file(
        tmp_path, row([0, 1.5], "a\u2028b"), "", row([2, 3], "b", ["EWR"]), row([4, 5], "")
    )
    bodies = from_rows_file("m", SIGNATURE, path, 2, kind)
    first, second = (as_server_reads(body, kind).tensors for body in bodies)
    assert same(
        first,
        {
            "x": np.array([[0, 1.5], [2, 3]], np.float32),
            "city": words("JFK", "EWR").reshape(2, 1),
            "word": words("a\u2028b", "b"),
        },
    )
    assert second["x"].tolist() == [[4, 5], [0, 1.5]], "filled up from the start"


def test_more_rows_than_there_are(tmp_path: Path) -> None:
    (body,) = from_rows_file("m", SIGNATURE, rows_file(tmp_path, row([1, 2])), 3, "json")
    tensors = as_server_reads(body, "json").tensors
    assert tensors["x"].tolist() == [[1, 2]] * 3
    assert tensors["word"].shape == (3,)


def test_rows_may_differ_in_length_where_each_is_a_request(tmp_path: Path) -> None:
    signature = {"inputs": [{"name": "tokens", "datatype": "INT64", "shape": [-1, -1]}]}
    path = rows_file(tmp_path, {"tokens": [1, 2]}, {"tokens": [3]})
    bodies = from_rows_file("m", signature, path, 1, "json")
    shapes = [as_server_reads(body, "json").tensors["tokens"].shape for body in bodies]
    assert shapes == [(1, 2), (1, 1)]
    with pytest.raises(RowsInvalid, match="rows: 1"):
        from_rows_file("m", signature, path, 2, "json")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", r":2 is not JSON"),
        ([1], r":2 holds list, allowed is an object"),
        ({"x": [1, 2]}, r":2 holds \['x'\], .*: x, city, word"),
        ({**row([1, 2]), "y": 1}, r":2 holds \['city', 'word', 'x', 'y'\]"),
        (row([1, 2, 3]), r":2: 'x' is of shape \[3\], a row of it is \[2\]"),
        (row([[1, 2]]), r":2: 'x' is of shape \[1, 2\]"),
        (row([1, "2"]), r":2: .*'x'.*numbers"),
        (row([1, [2]]), r":2: .*'x'"),
        (row([1, 2], word=3), r":2: .*'word'.*strings"),
    ],
)
def test_a_line_that_does_not_fit_is_told(line: Any, told: str, tmp_path: Path) -> None:
    path = rows_file(tmp_path, row([1, 2]), line)
    with pytest.raises(RowsInvalid, match=told):
        from_rows_file("m", SIGNATURE, path, 1, "json")


def test_integers_are_not_cut(tmp_path: Path) -> None:
    signature = {"inputs": [{"name": "n", "datatype": "INT64", "shape": [-1, 1]}]}
    with pytest.raises(RowsInvalid, match=r"rows\.jsonl:1: .*whole numbers"):
        from_rows_file("m", signature, rows_file(tmp_path, {"n": 1.5}), 1, "json")


def test_a_file_without_rows_is_told(tmp_path: Path) -> None:
    with pytest.raises(RowsInvalid, match="holds no rows"):
        from_rows_file("m", SIGNATURE, rows_file(tmp_path), 1, "json")
    with pytest.raises(RowsInvalid, match="cannot be read"):
        from_rows_file("m", SIGNATURE, tmp_path / "none", 1, "json")


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_invented_for_every_datatype(kind: Any) -> None:
    inputs = [
        {"name": datatype.value, "datatype": datatype.value, "shape": [-1, 3]}
        for datatype in Datatype
    ]
    bodies = from_signature({"name": "m", "inputs": inputs}, 3, 2, kind, seed=1)
    assert len({body.content for body in bodies}) == 3
    for body in bodies:
        tensors = as_server_reads(body, kind).tensors
        assert [tensors[item].dtype for item in Datatype] == list(map(numpy_dtype, Datatype))
        assert {array.shape for array in tensors.values()} == {(2, 3)}
        assert 0 <= tensors["INT8"].min() <= tensors["INT8"].max() < 10
        assert all(len(text) > 10 for text in tensors["BYTES"].flat)


def test_free_axes_are_as_long_as_one_another() -> None:
    metadata = {
        "name": "m",
        "versions": ["1"],
        "inputs": [
            {"name": "tokens", "datatype": "INT64", "shape": ["-1", "-1"]},
            {"name": "mask", "datatype": "INT64", "shape": [-1, -1]},
            {"name": "fixed", "datatype": "FP32", "shape": [8, 4]},
            {"name": "text", "datatype": "BYTES", "shape": [-1]},
        ],
    }
    lengths = set()
    for body in from_signature(metadata, 20, 2, "binary", seed=1):
        tensors = as_server_reads(body, "binary").tensors
        assert tensors["tokens"].shape == tensors["mask"].shape
        assert tensors["fixed"].shape == (8, 4)
        assert tensors["text"].shape == (2,)
        lengths.add(tensors["tokens"].shape[1])
    assert len(lengths) > 5
    assert 1 <= min(lengths) <= max(lengths) <= 64


def test_the_same_seed_invents_the_same() -> None:
    one, again, other = (from_signature(SIGNATURE, 5, 1, "json", seed) for seed in (1, 1, 2))
    assert one == again
    assert one != other


@pytest.mark.parametrize(
    ("metadata", "told"),
    [
        ({"name": "m"}, "inputs"),
        ({"name": "m", "inputs": []}, "has no inputs"),
        ({"name": "m", "inputs": [{"name": "x", "datatype": "FLOAT", "shape": [1]}]}, "FLOAT"),
        ({"name": "m", "inputs": [{"name": "x", "datatype": "FP32"}]}, "shape"),
    ],
)
def test_metadata_without_inputs_are_told(metadata: Any, told: str, tmp_path: Path) -> None:
    with pytest.raises(SignatureInvalid, match=told):
        from_signature(metadata, 1, 1, "json", seed=1)
    with pytest.raises(SignatureInvalid, match=told):
        from_rows_file("m", metadata, rows_file(tmp_path, {"x": 1}), 1, "json")


def test_bf16_is_exact_in_json() -> None:
    value = np.array([[1 / 3]], ml_dtypes.bfloat16)
    request = as_server_reads(encode("m", {"x": value}, "json"), "json")
    assert request.tensors["x"][0, 0] == value[0, 0]
