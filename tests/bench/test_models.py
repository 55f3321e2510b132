"""The measured models: pushed, loaded and asked as rayprism does it, and without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pyarrow.parquet as pq
import pytest

from bench import tiny_model
from bench.models import MODELS, ModelUnavailable
from bench.models.bodies import decode, encode
from rayprism.core.tensors import Tensors
from rayprism.models.loader import LoadedModel, load_model
from rayprism.models.repository import Repository
from rayprism.offline.columns import ColumnMap
from rayprism.protocol.grpc import (
    ModelInferRequest,
    decode_infer_request_grpc,
    encode_infer_response_grpc,
)
from tests.serving.conftest import serving
from tests.support.asyncs import async_test

NAMES = sorted(MODELS)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    root = tmp_path_factory.mktemp("bench") / "models"
    for model in MODELS.values():
        model.push(root, 1)
    return Repository(root)


@pytest.fixture(scope="module", params=NAMES)
def loaded(request: pytest.FixtureRequest, repository: Repository) -> Any:
    version = repository.version(request.param, 1)
    allow_code = MODELS[request.param].application_args().get("allow_code", False)
    model = load_model(version, allow_code=allow_code)
    yield model
    model.close()


def run(model: LoadedModel, tensors: Tensors) -> Tensors:
    return model.run(model.prepare(tensors))


@pytest.mark.parametrize("name", NAMES)
def test_pushing_again_adds_nothing(name: str, repository: Repository) -> None:
    MODELS[name].push(repository.root, 1)
    assert repository.versions(name) == [1]


@pytest.mark.parametrize("name", ["tiny", "ragged"])
def test_missing_versions_are_added(name: str, tmp_path: Path) -> None:
    for versions in (1, 3):
        MODELS[name].push(tmp_path, versions)
        assert Repository(tmp_path).versions(name) == list(range(1, versions + 1))


@pytest.mark.parametrize("name", NAMES)
def test_the_signature_is_the_versions(name: str, repository: Repository) -> None:
    inputs = repository.version(name, 1).manifest.inputs
    pushed = [(spec.name, spec.datatype.value, list(spec.shape)) for spec in inputs]
    told = [
        (item["name"], item["datatype"], item["shape"])
        for item in MODELS[name].signature()["inputs"]
    ]
    assert told == pushed


@pytest.mark.parametrize("rows", [1, 3])
def test_a_loaded_version_answers_rightly(loaded: LoadedModel, rows: int) -> None:
    model = MODELS[loaded.manifest.model]
    first, second = model.requests(2, rows, seed=1)
    answer = run(loaded, first)
    assert all(len(array) == rows for array in (*first.values(), *answer.values()))
    assert model.is_right(first, answer)
    assert not model.is_right(second, answer), "an answer to another request"
    assert not model.is_right(first, {}), "no outputs"
    assert not model.is_right(first, {name: array[:0] for name, array in answer.items()})
    assert not model.is_right(first, {name: np.zeros_like(array) for name, array in answer.items()})


@pytest.mark.parametrize("name", NAMES)
def test_requests_are_as_the_seed_says(name: str) -> None:
    def content(seed: int) -> list[bytes]:
        return [encode(name, item, "grpc").content for item in MODELS[name].requests(4, 2, seed)]

    assert content(1) == content(1)
    assert len(set(content(1)) | set(content(2))) == 8, "all differ"


@pytest.mark.parametrize("name", ["tiny", "images", "ragged"])
def test_peers_get_the_file_that_was_pushed(
    name: str, repository: Repository, tmp_path: Path
) -> None:
    files = MODELS[name].prepare(tmp_path / "new")
    assert files == {"model_file": tmp_path / "new" / f"{name}.onnx", "tokenizer": None}
    content = files["model_file"].read_bytes()
    version = repository.version(name, 1)
    assert (version.folder / version.manifest.file).read_bytes() == content
    written = files["model_file"].stat().st_mtime_ns
    assert MODELS[name].prepare(tmp_path / "new") == files
    assert files["model_file"].stat().st_mtime_ns == written
    assert [path.name for path in (tmp_path / "new").iterdir()] == [f"{name}.onnx"]


def test_a_damaged_file_is_written_anew(tmp_path: Path) -> None:
    path = MODELS["tiny"].prepare(tmp_path)["model_file"]
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    MODELS["tiny"].prepare(tmp_path)
    assert path.read_bytes() == whole


def test_the_sentence_model_comes_with_its_tokenizer(
    repository: Repository, tmp_path: Path
) -> None:
    files = MODELS["minilm"].prepare(tmp_path)
    version = repository.version("minilm", 1)
    for key, name in (("model_file", "model.onnx"), ("tokenizer", "tokenizer.json")):
        assert files[key].read_bytes() == (version.folder / name).read_bytes()


def test_a_missing_package_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = type(MODELS["minilm"])("minilm")
    monkeypatch.setattr(model._script, "NETWORK", ("no-such-package", "model.onnx"))
    monkeypatch.setattr(model._script, "HOW_TO_INSTALL", {"no-such-package": "pip install it"})
    with pytest.raises(ModelUnavailable, match="pip install it"):
        model.prepare(tmp_path)


def test_tiny_is_the_model_that_was_measured_before(tmp_path: Path) -> None:
    tiny_model.write_onnx(tmp_path / "before.onnx")
    row = {tiny_model.INPUT: tiny_model.sample_row()}
    answer = np.array([[tiny_model.expected(tmp_path / "before.onnx")]], np.float32)
    assert MODELS["tiny"].is_right(row, {tiny_model.OUTPUT: answer})


def test_an_image_is_600_kb() -> None:
    (tensors,) = MODELS["images"].requests(1, 2, 1)
    assert (tensors["image"].shape, tensors["image"].dtype) == ((2, 3, 448, 448), np.uint8)
    assert tensors["image"].nbytes == 2 * 602_112


def test_lengths_are_mixed() -> None:
    lengths = [item["tokens"].shape[1] for item in MODELS["ragged"].requests(400, 1, 1)]
    assert min(lengths) >= 8
    assert max(lengths) <= 512
    assert np.histogram(lengths, 4, (8, 512))[0].min() > 60, "each as likely as another"
    texts = [len(item["text"][0].split()) for item in MODELS["minilm"].requests(400, 1, 1)]
    assert (min(texts), max(texts)) == (5, 60)


def test_padding_changes_no_ragged_answer() -> None:
    (tensors,) = MODELS["ragged"].requests(1, 2, 1)
    padded = {"tokens": np.pad(tensors["tokens"], ((0, 0), (0, 90)))}
    assert MODELS["ragged"].is_right(padded, MODELS["ragged"].expected(tensors))
    twice = {"tokens": np.tile(tensors["tokens"], (1, 2))}
    assert MODELS["ragged"].is_right(twice, MODELS["ragged"].expected(tensors)), "a mean"


def test_ragged_requests_share_batches(repository: Repository) -> None:
    batching = repository.version("ragged", 1).manifest.batching
    assert list(batching.ragged) == ["tokens"]
    assert batching.max_cost is not None


def test_what_is_computed_is_onnx_runtimes(tmp_path: Path) -> None:
    files = MODELS["images"].prepare(tmp_path)
    session = onnxruntime.InferenceSession(files["model_file"])
    (tensors,) = MODELS["images"].requests(1, 2, 1)
    (scores,) = session.run(["scores"], tensors)
    assert MODELS["images"].is_right(tensors, {"scores": scores})
    changed = scores.copy()
    changed[1, 9] += 1e-3
    assert not MODELS["images"].is_right(tensors, {"scores": changed})
    assert MODELS["images"].is_right(tensors, {"scores": scores, "other": scores})


@pytest.mark.parametrize("kind", ["json", "binary"])
@pytest.mark.parametrize("name", NAMES)
@async_test
async def test_the_server_answers_over_http(name: str, kind: Any, repository: Repository) -> None:
    model = MODELS[name]
    allow_code = model.application_args().get("allow_code", False)
    async with serving(repository.version(name, 1), allow_code=allow_code) as (_, client):
        for tensors in model.requests(2, 2, seed=3):
            body = encode(name, tensors, kind)
            answer = await client.post(
                f"/v2/models/{name}/infer", content=body.content, headers=dict(body.headers)
            )
            assert answer.status_code == 200, answer.text
            assert model.is_right(tensors, decode(kind, answer.headers, answer.content))


def test_the_server_answers_over_grpc(loaded: LoadedModel) -> None:
    model = MODELS[loaded.manifest.model]
    for tensors in model.requests(2, 2, seed=3):
        message = ModelInferRequest.FromString(encode(model.name, tensors, "grpc").content)
        assert message.model_name == model.name
        request = decode_infer_request_grpc(message)
        outputs = run(loaded, request.tensors)
        answer = encode_infer_response_grpc(model.name, "1", request, outputs)
        assert model.is_right(tensors, decode("grpc", {}, answer.SerializeToString()))


def test_the_input_of_a_job_is_rows_of_the_model(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.models.tiny._GROUP_ROWS", 400)
    path = MODELS["tiny"].job_input(1000, tmp_path / "data")
    table = pq.read_table(path)
    assert pq.ParquetFile(path).num_row_groups == 3
    column = table.column("features").combine_chunks()
    rows = column.flatten().to_numpy().reshape(len(column), -1)
    assert (rows.shape, rows.dtype) == ((1000, 30), np.float32)
    assert len(np.unique(rows, axis=0)) == 1000
    model = load_model(repository.version("tiny", 1))
    assert MODELS["tiny"].is_right({"features": rows}, model.run({"features": rows}))
    model.close()
    written = path.stat().st_mtime_ns
    assert MODELS["tiny"].job_input(1000, tmp_path / "data") == path
    assert path.stat().st_mtime_ns == written
    assert MODELS["tiny"].job_input(10, tmp_path / "data") != path


def test_a_job_reads_that_input(repository: Repository, tmp_path: Path) -> None:
    table = pq.read_table(MODELS["tiny"].job_input(10, tmp_path))
    columns = ColumnMap.plan(table.schema, repository.version("tiny", 1).manifest)
    mapped = columns.tensors(table)
    assert mapped.ok.all()
    assert mapped.tensors["features"].shape == (10, 30)


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"tiny"}))
def test_there_are_no_jobs_of_the_others(name: str, tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError, match="whose model is tiny"):
        MODELS[name].job_input(10, tmp_path)
