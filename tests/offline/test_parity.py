"""What a job wrote against what an endpoint answers: real files, a real model, real wires."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from rayprism.core.compare import Tolerance
from rayprism.core.tensors import Datatype, RaggedAxis, Tensors, TensorSpec
from rayprism.errors import SetupError
from rayprism.models.manifest import Batching
from rayprism.models.push import push_model
from rayprism.models.repository import ModelVersion, Repository
from rayprism.offline.commits import JobChanged, OutputFolder
from rayprism.offline.endpoint import Endpoint, EndpointError, Refused, Served, parse_url
from rayprism.offline.filesystems import open_filesystem
from rayprism.offline.parity import Parity, compare_row, largest_difference, run_parity
from rayprism.offline.parity_rows import draw_rows
from rayprism.offline.plan import Plan, plan_job
from rayprism.offline.spec import parse_spec
from rayprism.offline.worker import ShardWorker
from tests.examples.local_server import Server, serve_version
from tests.examples.scripts import import_script
from tests.support.models import mlp_example, mlp_reference, save_mlp

MIXED = """
import numpy as np
from rayprism.errors import InvalidInput

class Model:
    def __init__(self, folder, options):
        pass

    def predict(self, inputs):
        texts = [text.decode() for text in inputs["text"]]
        if "boom" in texts:
            raise RuntimeError("cannot")
        if "bad" in texts:
            raise InvalidInput("text: may not be bad")
        label = np.empty(len(texts), object)
        label[:] = [text.upper().encode() for text in texts]
        size = np.array([len(text) for text in texts], np.int64)
        return {"y": inputs["x"] * np.float32(2), "label": label, "size": size}
"""
WHOLE = """
import numpy as np

class Model:
    def __init__(self, folder, options):
        pass

    def predict(self, inputs):
        x = inputs["x"]
        return {"mean": np.mean(x, dtype=np.float32).reshape(1), "sorted": np.sort(x)}
"""
X = TensorSpec("x", Datatype.FP32, (-1, -1))


def push_code(
    repository: Repository, folder: Path, name: str, text: str, example: Tensors, **more: Any
) -> ModelVersion:
    source = folder / name
    source.mkdir(exist_ok=True)
    (source / "model.py").write_text(text)
    return push_model(
        repository,
        name,
        source,
        example=example,
        runtime="python",
        code="model.py:Model",
        allow_code=True,
        **more,
    ).version


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """`tiny` 1 and 2: `x` FP32 [-1, 4] to `y` FP32 [-1, 3], with other weights."""
    folder = tmp_path_factory.mktemp("parity")
    found = Repository(folder / "models")
    for seed in (0, 1):
        path = save_mlp(folder / f"tiny{seed}.onnx", seed=seed)
        push_model(found, "tiny", path, example=mlp_example())
    return found


@pytest.fixture(scope="module")
def server(repository: Repository) -> Iterator[Server]:
    """`tiny` 1."""
    with serve_version(repository.version("tiny", 1)) as running:
        yield running


@pytest.fixture(scope="module")
def mixed(repository: Repository, tmp_path_factory: pytest.TempPathFactory) -> ModelVersion:
    """Text and lists of any length in, lists of the same length and text out."""
    return push_code(
        repository,
        tmp_path_factory.mktemp("mixed"),
        "mixed",
        MIXED,
        {"text": np.array([b"a"], object), "x": np.ones((1, 2), np.float32)},
        inputs=[TensorSpec("text", Datatype.BYTES, (-1,)), X],
        outputs=[
            TensorSpec("y", Datatype.FP32, (-1, -1)),
            TensorSpec("label", Datatype.BYTES, (-1,)),
            TensorSpec("size", Datatype.INT64, (-1,)),
        ],
        batching=Batching(ragged={"x": RaggedAxis(1)}, ragged_outputs={"y": 1}),
    )


@pytest.fixture(scope="module")
def whole(repository: Repository, tmp_path_factory: pytest.TempPathFactory) -> ModelVersion:
    """Not batched: one list in, its mean and the sorted list out."""
    return push_code(
        repository,
        tmp_path_factory.mktemp("whole"),
        "whole",
        WHOLE,
        {"x": np.array([3, 1, 2], np.float32)},
        inputs=[TensorSpec("x", Datatype.FP32, (-1,))],
        outputs=[
            TensorSpec("mean", Datatype.FP32, (1,)),
            TensorSpec("sorted", Datatype.FP32, (-1,)),
        ],
        batching=Batching(batched=False, max_rows=1),
    )


def config(
    repository: Repository, source: Path, output: Path, model: str = "tiny", **more: Any
) -> dict[str, Any]:
    columns = {"columns": {"x": list("abcd")}} if model == "tiny" else {}
    return {
        "model": model,
        "version": "1",
        "repository": str(repository.root),
        "allow_code": model != "tiny",
        "input": {"uri": str(source), **columns},
        "output": {"uri": str(output), "passthrough": ["id"], **more},
        "limits": {"shard_rows": 500, "shard_bytes": 4096},
    }


def planned(said: dict[str, Any]) -> Plan:
    return plan_job(parse_spec(said))


def work(plan: Plan) -> OutputFolder:
    """Does the whole job, as its actors do."""
    output = OutputFolder(*open_filesystem(plan.spec.output.uri))
    output.begin(plan.identity(), len(plan.shards))
    worker = ShardWorker(plan.spec, plan.listing, output)
    outcomes = [worker.run(shard) for shard in plan.shards]
    worker.close()
    assert not [outcome.error for outcome in outcomes if outcome.error]
    return output


def numbers(rows: int = 2000) -> pa.Table:
    values = np.random.default_rng(3).standard_normal((rows, 4)).astype(np.float32)
    return pa.table({"id": range(rows), **{name: values[:, at] for at, name in enumerate("abcd")}})


@pytest.fixture
def job(repository: Repository, tmp_path: Path) -> Plan:
    """2,000 rows in four shards, done by `tiny` 1."""
    source = tmp_path / "rows.parquet"
    pq.write_table(numbers(), source, row_group_size=500)
    plan = planned(config(repository, source, tmp_path / "out"))
    work(plan)
    return plan


def parity(plan: Plan, server: Server, **more: Any) -> Parity:
    with Endpoint(plan.version.manifest, server.url) as endpoint:
        return run_parity(plan, endpoint, **more)


def change_output(part: Path, column: str, row: int, value: Any) -> None:
    table = pq.read_table(part)
    values = table[column].to_pylist()
    values[row] = value
    at = table.column_names.index(column)
    table = table.set_column(at, table.schema.field(at), pa.array(values, table.schema.types[at]))
    pq.write_table(table, part)


# --- drawing


@given(
    st.dictionaries(st.integers(0, 400), st.integers(0, 60), max_size=120),
    st.integers(1, 300),
    st.integers(0, 9),
)
def test_rows_are_drawn_once_out_of_few_shards(
    rows: dict[int, int], sample: int, seed: int
) -> None:
    drawn = draw_rows(rows, sample, seed, most_shards=8)
    total = sum(rows.values())
    for shard, places in drawn.items():
        assert len(places)
        assert places[0] >= 0
        assert places[-1] < rows[shard]
        assert (np.diff(places) > 0).all()
    count = sum(map(len, drawn.values()))
    if sample >= total:
        assert count == total
        return
    assert count <= sample
    filled = sum(count > 0 for count in rows.values())
    if filled <= 8:
        assert count == sample
    else:
        assert len(drawn) <= 8
        again = draw_rows(rows, sample, seed, most_shards=8)
        assert {k: v.tolist() for k, v in again.items()} == {
            k: v.tolist() for k, v in drawn.items()
        }


@pytest.mark.parametrize("shards", [5, 60])
def test_every_row_is_as_likely_as_another(shards: int) -> None:
    sizes = {shard: 10 if shard % 3 else 40 for shard in range(shards)}
    seen: Counter[int] = Counter()
    runs, sample = 400, 25
    for seed in range(runs):
        for shard, places in draw_rows(sizes, sample, seed, most_shards=10).items():
            seen[shard] += len(places)
    expected = runs * sample / sum(sizes.values())
    small = np.mean([seen[shard] / 10 for shard in sizes if shard % 3])
    large = np.mean([seen[shard] / 40 for shard in sizes if shard % 3 == 0])
    assert small == pytest.approx(expected, rel=0.05)
    assert large == pytest.approx(expected, rel=0.05)
    half = sum(seen[shard] for shard in sizes if shard < shards / 2)
    rows = sum(size for shard, size in sizes.items() if shard < shards / 2)
    assert half / rows == pytest.approx(expected, rel=0.05), "the first are as likely as the last"


def test_a_sample_does_not_need_memory_for_all_rows() -> None:
    drawn = draw_rows(dict.fromkeys(range(1000), 10**12), 256, 0)
    assert sum(map(len, drawn.values())) == 256
    assert len(drawn) == 32


# --- comparing


def array(*values: float) -> np.ndarray[Any, Any]:
    return np.array([values], np.float32)


def test_differences_are_told_in_both_ways() -> None:
    gap = largest_difference(array(100.0, 2.0), array(101.0, 2.5))
    assert gap == pytest.approx((1.0, 0.25))
    assert largest_difference(array(np.nan, np.inf, 0), array(np.nan, np.inf, 0)) == (0.0, 0.0)
    assert largest_difference(array(1.0), array(np.nan)) == (np.inf, np.inf)
    assert largest_difference(array(0.0), array(0.5)) == (0.5, 0.0), "there is no share of nothing"
    assert largest_difference(array(1.0), array(1.0, 2.0)) is None
    text = np.array([b"a"], object)
    assert largest_difference(text, text) is None


def test_a_row_agrees_by_the_rule_of_the_manifest() -> None:
    online, offline = array(1.0, 2.0), array(1.1, 2.2)
    assert compare_row("y", online, offline, Tolerance()) is not None
    assert compare_row("y", online, offline, Tolerance(rule="top1")) is None
    assert compare_row("y", online, offline, Tolerance(rule="cosine")) is None
    assert compare_row("y", None, offline, Tolerance()) is not None
    empty = np.empty((1, 0, 3), np.float32)
    assert compare_row("y", empty, empty.reshape(1, 0), Tolerance()) is None


# --- whole


@pytest.mark.parametrize("batch_rows", [1, 7])
def test_an_output_agrees_with_the_version_that_made_it(
    job: Plan, server: Server, batch_rows: int
) -> None:
    got = parity(job, server, sample=60, batch_rows=batch_rows)
    assert got.agrees
    assert (got.rows, got.agree, got.outputs["y"].agree) == (60, 60, 60)
    assert got.outputs["y"].largest_absolute is not None
    assert got.outputs["y"].largest_absolute < 1e-5
    assert (got.shards, got.shards_done, got.rows_done) == (4, 4, 2000)
    assert got.shards_read == 4
    assert got.endpoint_digest in (None, job.version.manifest.digest)


def test_over_grpc(job: Plan, server: Server) -> None:
    with Endpoint(job.version.manifest, grpc=server.grpc_url) as endpoint:
        assert run_parity(job, endpoint, sample=20, batch_rows=3).agrees


def test_a_wrong_row_is_found_and_shown(job: Plan, server: Server) -> None:
    change_output(Path(job.spec.output.uri, "part-00000002.parquet"), "y", 17, [9.0, 8.0, 7.0])
    got = parity(job, server, sample=2000, batch_rows=50)
    assert not got.agrees
    assert (got.agree, got.outputs["y"].disagree, got.disagreement_count) == (1999, 1, 1)
    (found,) = got.disagreements
    assert (found.shard, found.file, found.row, found.output) == (2, "rows.parquet", 1017, "y")
    assert found.offline == "[9, 8, 7]"
    assert found.online != found.offline
    largest = got.outputs["y"].largest_absolute
    assert largest is not None
    assert largest > 1


class Silent(Endpoint):
    """Of an endpoint that does not tell its digest."""

    def describe(self) -> Served:
        return replace(super().describe(), digest=None)


def test_another_version_under_the_same_number_disagrees(
    job: Plan, repository: Repository, tmp_path: Path
) -> None:
    path = save_mlp(tmp_path / "other.onnx", seed=5)
    other = push_model(Repository(tmp_path / "other"), "tiny", path, example=mlp_example())
    with (
        serve_version(other.version) as server,
        Silent(job.version.manifest, server.url) as endpoint,
    ):
        got = run_parity(job, endpoint, sample=20)
    assert got.outputs["y"].disagree == 20
    assert got.endpoint_digest is None
    assert len(got.disagreements) == 10, "the first ones are shown"
    assert got.disagreement_count == 20


def test_rows_stay_in_step_with_the_output_behind_dead_letters(
    repository: Repository, server: Server, tmp_path: Path
) -> None:
    """Lines that are none, values that are none, and good rows between them, of several shards."""
    lines = ["id,a,b,c,d\n"]
    for row in range(900):
        lines.append(f"{row},{row / 7:.5f},1,2,3\n")
    for row in (1, 2, 150, 400, 401, 402, 899):
        lines[row + 1] = f"{row},x,1,2,3\n"
    for row in (0, 149, 152, 500, 898):
        lines[row + 1] = "not a row\n"
    source = tmp_path / "rows.csv"
    source.write_text("".join(lines))
    plan = planned(config(repository, source, tmp_path / "out", row_position=True))
    assert len(plan.shards) > 3
    work(plan)
    got = parity(plan, server, sample=900, batch_rows=32)
    assert got.agrees
    assert (got.rows, got.agree) == (900, 888)
    assert (got.letters.not_sent, got.letters.refused, got.letters.answered) == (12, 0, 0)
    few = parity(plan, server, sample=40, seed=4)
    assert few.agree + few.letters.not_sent == 40


def mixed_rows(rows: int = 120) -> pa.Table:
    random = np.random.default_rng(5)
    texts = ["".join(random.choice(list("abcé日"), 1 + row % 5)) for row in range(rows)]
    texts[7], texts[70] = "boom", "bad"
    lists = [random.standard_normal(1 + row % 4).astype(np.float32).tolist() for row in range(rows)]
    return pa.table(
        {"id": range(rows), "text": texts, "x": pa.array(lists, pa.list_(pa.float32()))}
    )


@pytest.fixture
def mixed_job(repository: Repository, mixed: ModelVersion, tmp_path: Path) -> Plan:
    source = tmp_path / "rows.parquet"
    pq.write_table(mixed_rows(), source)
    plan = planned(config(repository, source, tmp_path / "out", "mixed"))
    work(plan)
    return plan


@pytest.mark.parametrize("batch_rows", [1, 8])
def test_text_and_rows_of_any_length_agree(
    mixed: ModelVersion, mixed_job: Plan, batch_rows: int
) -> None:
    with serve_version(mixed, allow_code=True) as server:
        got = parity(mixed_job, server, batch_rows=batch_rows)
        with Endpoint(mixed.manifest, grpc=server.grpc_url) as endpoint:
            assert run_parity(mixed_job, endpoint, sample=30).agrees
    assert got.agrees
    assert (got.rows, got.agree) == (120, 120)
    assert got.letters.refused == 2, "both say that the model fails on these rows"
    assert {name: output.agree for name, output in got.outputs.items()} == {
        "y": 118,
        "label": 118,
        "size": 118,
    }
    assert got.outputs["label"].largest_absolute is None


class Obliging:
    """Stands for an endpoint that answers every request, with what the job wrote or nearly so."""

    address = "http://obliging"

    def __init__(self, plan: Plan, **outputs: Any) -> None:
        manifest = plan.version.manifest
        self.outputs = outputs
        self.served = Served(
            (str(manifest.version),),
            {spec.name: (spec.datatype.value, spec.shape) for spec in manifest.inputs},
            {spec.name: (spec.datatype.value, spec.shape) for spec in manifest.outputs},
        )

    def describe(self) -> Served:
        return self.served

    def infer(self, inputs: Tensors) -> Tensors:
        rows = len(next(iter(inputs.values())))
        return {name: np.repeat(value, rows, axis=0) for name, value in self.outputs.items()}


def test_a_dead_letter_that_the_endpoint_answers_is_a_disagreement(mixed_job: Plan) -> None:
    label = np.array([b"X"], object)
    answers = {"y": np.zeros((1, 1), np.float32), "label": label, "size": np.zeros(1, np.int64)}
    got = run_parity(mixed_job, Obliging(mixed_job, **answers))
    assert got.letters.answered == 2
    assert not got.agrees
    assert got.disagreement_count > 2


def test_a_row_that_only_the_endpoint_refuses_is_a_disagreement(job: Plan) -> None:
    class Refusing(Obliging):
        def infer(self, inputs: Tensors) -> Tensors:
            raise Refused("400", "not today")

    got = run_parity(job, Refusing(job), sample=9, batch_rows=4)
    assert (got.rows, got.agree, got.outputs["y"].disagree) == (9, 0, 9)
    assert {item.online for item in got.disagreements} == {"400: not today"}


def test_of_rows_that_went_together_only_the_refused_one_disagrees(job: Plan) -> None:
    class Choosy(Obliging):
        def infer(self, inputs: Tensors) -> Tensors:
            if (inputs["x"] > 3).any():
                raise Refused("400", "too large")
            return {"y": mlp_reference(inputs["x"])}

    got = run_parity(job, Choosy(job), sample=2000, batch_rows=50)
    values = np.stack([numbers()[name].to_numpy() for name in "abcd"])
    refused = int((values > 3).any(axis=0).sum())
    assert 0 < refused < 20
    assert (got.disagreement_count, got.agree) == (refused, 2000 - refused)


def test_a_model_that_takes_one_row_at_a_time(
    repository: Repository, whole: ModelVersion, tmp_path: Path
) -> None:
    source = tmp_path / "rows.jsonl"
    values = [[float(value) for value in range(row % 5, -1, -1)] for row in range(60)]
    lines = [json.dumps({"id": row, "x": value}) + "\n" for row, value in enumerate(values)]
    source.write_text("".join(lines))
    plan = planned(config(repository, source, tmp_path / "out", "whole"))
    work(plan)
    with serve_version(whole, allow_code=True) as server:
        got = parity(plan, server, batch_rows=8)
    assert got.agrees
    assert (got.rows, got.agree, got.rows_together) == (60, 60, 1)


def test_images_agree_one_file_a_row(repository: Repository, tmp_path: Path) -> None:
    """Of many files, some are no images: the others are still found in the output."""
    from PIL import Image

    path = save_mlp(tmp_path / "flat.onnx")
    name = "pixels"
    version = push_model(repository, name, path, example=mlp_example()).version
    folder = tmp_path / "images"
    folder.mkdir()
    random = np.random.default_rng(2)
    for index in range(40):
        file = folder / f"{index:02}.png"
        Image.fromarray(random.integers(0, 256, (1, 4), np.uint8)).save(file)
        if index in (3, 17, 18):
            file.write_bytes(file.read_bytes()[:40])
    said = config(repository, folder, tmp_path / "out", name, row_position=True)
    said["input"] |= {"format": "images", "images": {"size": [1, 4], "mode": "L"}}
    said["output"]["passthrough"] = ["path"]
    said["limits"] = {"shard_rows": 16}
    plan = planned(said)
    work(plan)
    with serve_version(version) as server:
        got = parity(plan, server, batch_rows=8)
        assert parity(plan, server, sample=9, seed=1).agrees
    assert got.agrees
    assert (got.rows, got.agree, got.letters.not_sent) == (40, 37, 3)


# --- what cannot be compared


def test_a_job_at_work_is_compared_as_far_as_it_is(job: Plan, server: Server) -> None:
    Path(job.spec.output.uri, "_shards", "00000001.json").unlink()
    got = parity(job, server, sample=5000, batch_rows=100)
    assert got.agrees
    assert (got.shards, got.shards_done, got.rows) == (4, 3, 1500)


def test_an_output_of_another_job_is_refused(
    job: Plan, server: Server, repository: Repository, tmp_path: Path
) -> None:
    other = planned(config(repository, tmp_path / "rows.parquet", tmp_path / "out", prefix="p_"))
    with pytest.raises(JobChanged, match=r"job\.output\.prefix: was \"\", is \"p_\""):
        parity(other, server)
    pq.write_table(numbers(2100), tmp_path / "rows.parquet", row_group_size=500)
    now = planned(config(repository, tmp_path / "rows.parquet", tmp_path / "out"))
    with pytest.raises(JobChanged, match="input"):
        parity(now, server)


def test_rows_that_are_not_the_inputs_are_refused(job: Plan, server: Server) -> None:
    change_output(Path(job.spec.output.uri, "part-00000001.parquet"), "id", 3, 77_777)
    with pytest.raises(SetupError, match=r"column 'id' has 503, the output has 77777"):
        parity(job, server, sample=2000, batch_rows=100)


def test_no_output_and_nothing_done_yet(
    job: Plan, server: Server, repository: Repository, tmp_path: Path
) -> None:
    nothing = planned(config(repository, tmp_path / "rows.parquet", tmp_path / "none"))
    with pytest.raises(SetupError, match="no job's output"):
        parity(nothing, server)
    for entry in Path(job.spec.output.uri, "_shards").iterdir():
        entry.unlink()
    with pytest.raises(SetupError, match=r"no shard in .* is done yet"):
        parity(job, server)


def test_what_is_wrong_with_an_endpoint_is_said(
    job: Plan, server: Server, repository: Repository, mixed: ModelVersion
) -> None:
    manifest = job.version.manifest
    second = repository.version("tiny", 2).manifest
    for address in ({"url": server.url}, {"grpc": server.grpc_url}):
        with (
            Endpoint(second, **address) as endpoint,
            pytest.raises(EndpointError, match="in version 1, and the job ran version 2"),
        ):
            endpoint.describe()
        with (
            Endpoint(mixed.manifest, **address) as endpoint,
            pytest.raises(EndpointError, match="no model 'mixed'"),
        ):
            endpoint.describe()
    for address in ({"url": "http://127.0.0.1:9"}, {"grpc": "127.0.0.1:9"}):
        with (
            Endpoint(manifest, **address) as endpoint,
            pytest.raises(EndpointError, match=r"nothing answers at .*127\.0\.0\.1:9"),
        ):
            endpoint.describe()


@pytest.mark.parametrize(
    ("served", "said"),
    [
        ({"digest": "sha256:0"}, "its digest is sha256:0"),
        ({"inputs": {"z": ("FP32", (-1, 4))}}, r"its inputs are z FP32 \[-1, 4\]"),
        ({"outputs": {"y": ("FP64", (-1, 3))}}, "its outputs are y FP64"),
    ],
)
def test_an_endpoint_that_serves_something_else_is_refused(
    job: Plan, served: dict[str, Any], said: str
) -> None:
    endpoint = Obliging(job)
    endpoint.served = replace(endpoint.served, **served)
    with pytest.raises(EndpointError, match=said):
        run_parity(job, endpoint)


class Scripted:
    """Stands for an endpoint, or for what else answers at its address: one answer after the other.

    Args:
        answers: Status and body.
    """

    def __init__(self, *answers: tuple[int, str]) -> None:
        left = list(answers)

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.rfile.read(int(self.headers.get("content-length", 0)))
                status, body = left.pop(0)
                self.send_response(status)
                self.send_header("content-length", str(len(body.encode())))
                self.end_headers()
                self.wfile.write(body.encode())

            do_POST = do_GET  # noqa: N815 - the name of the method

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.left = left
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Scripted:
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


BUSY = (503, '{"error": "queue is full"}')
METADATA = (
    200,
    json.dumps(
        {
            "name": "tiny",
            "versions": ["1"],
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}],
            "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 3]}],
        }
    ),
)


def answered(version: str, rows: int = 1) -> tuple[int, str]:
    output = {"name": "y", "datatype": "FP32", "shape": [rows, 3], "data": [0.0] * (3 * rows)}
    return 200, json.dumps({"model_name": "tiny", "model_version": version, "outputs": [output]})


def test_a_busy_endpoint_is_waited_for(job: Plan) -> None:
    waited: list[float] = []
    config = (200, json.dumps({"parameters": {"digest": {"string_value": "sha256:7"}}}))
    with (
        Scripted(BUSY, BUSY, METADATA, config, *[BUSY] * 6) as server,
        Endpoint(job.version.manifest, server.url, sleep=waited.append) as endpoint,
    ):
        served = endpoint.describe()
        assert served.versions == ("1",)
        assert served.digest == "sha256:7"
        assert len(waited) == 2
        assert sorted(waited) == waited
        with pytest.raises(EndpointError, match=r"stays busy \(503, 6 tries\): queue is full"):
            endpoint.describe()


def test_answers_that_are_not_of_the_version_or_the_rows(job: Plan) -> None:
    config = (200, "{}")
    for answer, said in (
        (answered("4"), "answered with version 4 of 'tiny', asked was for 1"),
        (answered("1", rows=2), r"answered 1 rows with output 'y' of shape \[2, 3\]"),
        ((302, "moved"), "gave no answer"),
    ):
        with (
            Scripted(METADATA, config, answer) as server,
            Endpoint(job.version.manifest, server.url) as endpoint,
            pytest.raises(EndpointError, match=said),
        ):
            run_parity(job, endpoint, sample=1)


def test_a_proxy_without_the_model(job: Plan) -> None:
    nowhere = (404, "Path '/v2/models/tiny' not found.")
    with (
        Scripted(nowhere, nowhere) as server,
        Endpoint(job.version.manifest, server.url) as endpoint,
        pytest.raises(EndpointError, match="serves no model 'tiny'"),
    ):
        endpoint.describe()


@pytest.mark.parametrize("url", ["ftp://a", "http://", "http://a:1?x=1"])
def test_an_address_that_is_none(url: str) -> None:
    with pytest.raises(ValueError, match="allowed is an address"):
        parse_url(url)


def test_addresses() -> None:
    assert parse_url("http://127.0.0.1:8000/") == ("127.0.0.1:8000", False)
    assert parse_url("https://models.example/fleet") == ("models.example/fleet", True)
    assert parse_url("localhost:8000") == ("localhost:8000", False)


# --- the command


@pytest.fixture
def command(job: Plan, repository: Repository, tmp_path: Path) -> Any:
    main = import_script("../batch/parity.py").main
    file = tmp_path / "job.yaml"
    file.write_text(json.dumps(config(repository, tmp_path / "rows.parquet", tmp_path / "out")))

    def run(*arguments: object) -> Any:
        return CliRunner().invoke(main, [str(file), *map(str, arguments)])

    return run


def test_the_command_says_that_all_agree(command: Any, server: Server, tmp_path: Path) -> None:
    told = tmp_path / "parity.json"
    done = command("--url", server.url, "--sample", 50, "--batch-rows", 8, "--json", told)
    assert done.exit_code == 0, done.output
    assert "SAME: all 50 rows agree" in done.stdout
    said = json.loads(told.read_text())
    assert said["agrees"] is True
    assert said["outputs"]["y"]["compared"] == 50
    assert said["outputs"]["y"]["disagree"] == 0


def test_the_command_says_what_differs(
    command: Any, server: Server, job: Plan, tmp_path: Path
) -> None:
    change_output(
        Path(job.spec.output.uri, "part-00000000.parquet"), "y", 3, [float("nan"), 0.0, 0.0]
    )
    told = tmp_path / "parity.json"
    done = command("--url", server.url, "--sample", 2000, "--batch-rows", 100, "--json", told)
    assert done.exit_code == 1
    assert "DIFFERENT: 1 rows disagree" in done.stdout
    assert "rows.parquet at 3 (shard 0) output 'y'" in done.stdout
    said = json.loads(told.read_text())
    assert said["outputs"]["y"]["largest_absolute"] == "Infinity"
    assert said["disagreements"][0]["row"] == 3


def test_the_command_tells_errors_in_one_message(command: Any, server: Server) -> None:
    done = command("--url", "http://127.0.0.1:9")
    assert done.exit_code == 1
    assert done.stderr.startswith("error: nothing answers at http://127.0.0.1:9")
    assert "Traceback" not in done.output
    assert command("--url", "ftp://x").exit_code == 2
    assert command("--sample", 0).exit_code == 2
    assert command("--application", "a").exit_code == 2
