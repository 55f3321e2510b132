"""What peers make of bodies and batches."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.models import MODELS, ModelUnavailable
from bench.models.bodies import decode, encode
from bench.peers.served import Arguments, InvalidRequest, Served, best_batch, open_model
from rayprism.core.tensors import Tensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module", params=MODELS)
def served(request: pytest.FixtureRequest, folder: Path) -> Iterator[Served]:
    try:
        files = MODELS[request.param].prepare(folder)
    except ModelUnavailable as error:
        pytest.skip(str(error))
    arguments = Arguments(request.param, files["model_file"], 1, files["tokenizer"])
    return open_model(arguments)


def json_body(model: str, tensors: Tensors) -> bytes:
    return encode(model, tensors, "json").content


def answer(served: Served, outputs: Any) -> Tensors:
    return decode("json", {}, served.encode(outputs))


def test_each_way_to_write_a_request_is_read(served: Served) -> None:
    model = MODELS[served.name]
    (tensors,) = model.requests(1, 2, seed=1)
    binary = encode(served.name, tensors, "binary")
    length = int(dict(binary.headers)["inference-header-content-length"])
    for feed in (
        served.decode(json_body(served.name, tensors)),
        served.decode(binary.content, length),
        # Not every server shows headers.
        served.decode(binary.content),
    ):
        (outputs,) = served.run([feed])
        assert model.is_right(tensors, answer(served, outputs))


def test_requests_that_share_a_run_get_their_own_answers(served: Served) -> None:
    model = MODELS[served.name]
    requests = [model.requests(1, rows, seed=rows)[0] for rows in (1, 3, 2)]
    feeds = [served.decode(json_body(served.name, tensors)) for tensors in requests]
    together = served.run(feeds)
    assert len(together) == 3
    for tensors, outputs in zip(requests, together, strict=True):
        assert model.is_right(tensors, answer(served, outputs))
    assert not model.is_right(requests[0], answer(served, together[1]))


def test_binary_tensors_stand_behind_each_other_and_beside_json(folder: Path) -> None:
    served = open_model(Arguments("tiny", MODELS["tiny"].prepare(folder)["model_file"], 1))
    sent = {"a": np.array([[1, 2]], np.int64), "b": np.array([0.5, 0.25], np.float32)}
    header = {
        "inputs": [
            {"name": "a", "datatype": "INT64", "shape": [1, 2]},
            {"name": "c", "datatype": "UINT8", "shape": [1], "data": [7]},
            {"name": "b", "datatype": "FP32", "shape": [2]},
        ]
    }
    for tensor in header["inputs"]:
        if tensor["name"] in sent:
            size = sent[str(tensor["name"])].nbytes
            tensor["parameters"] = {"binary_data_size": size}
    body = json.dumps(header).encode() + sent["a"].tobytes() + sent["b"].tobytes()
    read = served.decode(body)
    assert {name: values.tolist() for name, values in read.items()} == {
        "a": [[1, 2]],
        "c": [7],
        "b": [0.5, 0.25],
    }


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'{"inputs": [{"name": "features"}]}',
        b'{"inputs": [{"name": "features", "datatype": "FP99", "shape": [1], "data": [1]}]}',
        b'{"inputs": [{"name": "features", "datatype": "FP32", "shape": [2], "data": [1]}]}',
        b'{"inputs": [{"name": "features", "datatype": "FP32", "shape": [1], '
        b'"parameters": {"binary_data_size": 4}}]}\x00',
    ],
)
def test_what_cannot_be_read_is_the_clients_fault(folder: Path, body: bytes) -> None:
    served = open_model(Arguments("tiny", MODELS["tiny"].prepare(folder)["model_file"], 1))
    with pytest.raises(InvalidRequest, match="not a request of tiny"):
        served.decode(body)


def test_an_answer_has_the_protocols_form(folder: Path) -> None:
    served = open_model(Arguments("tiny", MODELS["tiny"].prepare(folder)["model_file"], 1))
    outputs = {"score": np.array([[0.1], [0.25]], np.float32)}
    assert json.loads(served.encode(outputs)) == {
        "model_name": "tiny",
        "model_version": "1",
        "outputs": [{"name": "score", "datatype": "FP32", "shape": [2, 1], "data": [0.1, 0.25]}],
    }


def test_text_needs_a_tokenizer() -> None:
    with pytest.raises(SystemExit, match="minilm needs --tokenizer"):
        open_model(Arguments("minilm", Path("model.onnx"), 1))


def test_only_where_it_pays_do_requests_share_a_run() -> None:
    assert {name: best_batch(name) for name in MODELS} == {
        "tiny": 32,
        "minilm": 1,
        "images": 1,
        "ragged": 1,
        "vision": 1,
    }
