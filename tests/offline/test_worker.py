"""Whole shards: from files to committed files, with a real model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pyarrow import csv

from rayprism.core.shards import plan_shards
from rayprism.models.push import push_model
from rayprism.models.repository import Repository
from rayprism.offline.commits import OutputFolder, Totals
from rayprism.offline.files import list_inputs, open_filesystem
from rayprism.offline.images import plan_pixels
from rayprism.offline.spec import JobSpec, parse_spec
from rayprism.offline.worker import Outcome, ShardWorker
from tests.support.models import mlp_example, mlp_reference, save_channel_means, save_mlp

ROWS = 5000


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny` 1: `x` FP32 [-1, 4] to `y` FP32 [-1, 3]; `means` 1: images of 4x6 to 3 means."""
    folder = tmp_path_factory.mktemp("offline-models")
    models = Repository(folder / "models")
    push_model(models, "tiny", save_mlp(folder / "tiny.onnx"), example=mlp_example())
    means = save_channel_means(folder / "means.onnx", 4, 6)
    push_model(models, "means", means, example={"pixels": np.zeros((2, 3, 4, 6)).tolist()})
    return folder / "models"


def rows() -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(7).standard_normal((ROWS, 4)).astype(np.float32)


def table() -> pa.Table:
    columns = {name: rows()[:, index] for index, name in enumerate("abcd")}
    return pa.table({"id": pa.array(range(ROWS)), **columns})


def job(repository: Path, source: Path, output: Path, **more: Any) -> JobSpec:
    return parse_spec(
        {
            "model": "tiny",
            "version": "1",
            "repository": str(repository),
            "input": {"uri": str(source), "columns": {"x": list("abcd")}},
            "output": {"uri": str(output), "passthrough": ["id"], **more},
        }
    )


def run(spec: JobSpec, *, rows: int = 1000, size: int = 20_000) -> tuple[list[Outcome], Totals]:
    listing = list_inputs(spec.input.uri, format=None, columns=["id", *"abcd"])
    shards = plan_shards(listing.files, target_rows=rows, target_bytes=size)
    output = OutputFolder(*open_filesystem(spec.output.uri))
    output.begin(spec.identity(prepares=False), len(shards))
    worker = ShardWorker(spec, listing, output)
    missing = [shard for shard in shards if shard.number not in output.done()]
    outcomes = [worker.run(shard) for shard in missing]
    worker.close()
    return outcomes, output.totals()


def written(folder: Path) -> pa.Table:
    return pa.concat_tables(pq.read_table(file) for file in sorted(folder.glob("part-*.parquet")))


def letters(folder: Path) -> list[dict[str, Any]]:
    files = sorted((folder / "_dead_letters").glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


@pytest.mark.parametrize("format", ["parquet", "csv", "jsonl"])
def test_every_row_is_predicted_once_and_in_order(
    repository: Path, tmp_path: Path, format: str
) -> None:
    source = tmp_path / f"rows.{format}"
    if format == "parquet":
        pq.write_table(table(), source, row_group_size=700)
    elif format == "csv":
        csv.write_csv(table(), source)
    else:
        source.write_text("".join(json.dumps(row) + "\n" for row in table().to_pylist()))
    outcomes, totals = run(job(repository, source, tmp_path / "out"))
    assert [outcome.error for outcome in outcomes] == [None] * len(outcomes)
    assert len(outcomes) > 3, "one file is not one shard"
    assert (totals.rows_in, totals.rows_out, totals.dead_letters) == (ROWS, ROWS, 0)
    got = written(tmp_path / "out")
    assert [int(value) for value in got["id"].to_pylist()] == list(range(ROWS))
    np.testing.assert_allclose(
        np.array(got["y"].to_pylist()), mlp_reference(rows()), rtol=1e-4, atol=1e-5
    )
    assert set(got["model_version"].to_pylist()) == {"1"}


def test_rows_at_fault_become_dead_letters(repository: Path, tmp_path: Path) -> None:
    source = tmp_path / "rows.csv"
    csv.write_csv(table().slice(0, 300), source)
    lines = source.read_text().splitlines(keepends=True)
    lines[5], lines[100], lines[200] = "4,1,2\n", "99,1,x,3,4\n", "199,1,1e99,3,4\n"
    source.write_text("".join(lines))
    _, totals = run(job(repository, source, tmp_path / "out", row_position=True))
    assert (totals.rows_in, totals.rows_out, totals.dead_letters) == (300, 297, 3)
    found = letters(tmp_path / "out")
    starts = np.cumsum([0, *map(len, lines)])
    assert [letter["byte"] for letter in found] == [starts[5], starts[100], starts[200]]
    assert [letter["code"] for letter in found] == [
        "unreadable_row",
        "wrong_value",
        "out_of_range",
    ]
    assert {letter["file"] for letter in found} == {"rows.csv"}
    got = written(tmp_path / "out")
    assert not {"4", "99", "199"} & {str(value) for value in got["id"].to_pylist()}
    assert got["_row"].to_pylist()[:2] == [starts[1], starts[2]]


def test_what_was_done_is_not_done_again(repository: Path, tmp_path: Path) -> None:
    source = tmp_path / "rows.parquet"
    pq.write_table(table(), source, row_group_size=500)
    spec = job(repository, source, tmp_path / "out")
    first, _ = run(spec)
    whole = written(tmp_path / "out")
    (tmp_path / "out" / "_shards" / "00000002.json").unlink()
    again, totals = run(spec)
    assert [outcome.shard for outcome in again] == [2]
    assert totals.shards == len(first)
    assert written(tmp_path / "out").equals(whole)


def test_a_shard_that_cannot_be_done_says_why(repository: Path, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        pq.write_table(table().slice(0, 500), tmp_path / f"{name}.parquet")
    spec = job(repository, tmp_path / "*.parquet", tmp_path / "out")
    listing = list_inputs(spec.input.uri, format=None, columns=["id", *"abcd"])
    shards = plan_shards(listing.files, target_rows=1000, target_bytes=1 << 20)
    output = OutputFolder(*open_filesystem(spec.output.uri))
    output.begin(spec.identity(prepares=False), len(shards))
    (tmp_path / "b.parquet").unlink()
    worker = ShardWorker(spec, listing, output)
    good, bad, last = (worker.run(shard) for shard in shards)
    worker.close()
    assert good.error is None
    assert last.error is None
    assert bad.error is not None
    assert "b.parquet" in bad.error
    assert output.done() == {0, 2}
    broken = spec.model_copy(update={"version": 9})
    outcome = ShardWorker(broken, listing, output).run(shards[1])
    assert outcome.error is not None
    assert "no version 9" in outcome.error, "an actor that cannot load ends nothing but its shard"


# --- images


def colour(number: int) -> tuple[int, int, int]:
    return number, 2 * number, 255 - number


def image_job(repository: Path, source: Path, output: Path, **more: Any) -> JobSpec:
    return parse_spec(
        {
            "model": "means",
            "version": "1",
            "repository": str(repository),
            "input": {"uri": str(source), "images": {"size": [4, 6]}, "partitioning": "hive"},
            "output": {"uri": str(output), "passthrough": "*", **more},
        }
    )


def run_images(spec: JobSpec, files_per_shard: int) -> tuple[list[Outcome], Totals]:
    manifest = Repository(spec.repository_path()).version("means", 1).manifest
    listing = list_inputs(
        spec.input.uri,
        format=spec.input.format,
        columns=None,
        partitioning=spec.input.partitioning,
        pixels=plan_pixels(spec.input, manifest),
    )
    folders = [listing.partition_folder(index) for index in range(len(listing.files))]
    shards = plan_shards(
        listing.files,
        target_rows=1,
        target_bytes=1,
        files_per_shard=files_per_shard,
        folders=folders if spec.output.partitioned else None,
    )
    output = OutputFolder(*open_filesystem(spec.output.uri))
    output.begin(spec.identity(prepares=False), len(shards))
    worker = ShardWorker(spec, listing, output, threads=2)
    outcomes = [worker.run(shard) for shard in shards]
    worker.close()
    return outcomes, output.totals()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """30 images of one colour each, of many sizes; 5, 11 and 12 are none."""
    for number in range(30):
        path = tmp_path / "in" / f"half={number // 15}" / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (3 + number, 9), colour(number)).save(path)
    (tmp_path / "in" / "half=0" / "05.png").write_bytes(b"")
    (tmp_path / "in" / "half=0" / "11.png").write_text("a text")
    (tmp_path / "in" / "half=0" / "12.png").write_bytes(path.read_bytes()[:50])
    return tmp_path / "in"


@pytest.mark.parametrize("files_per_shard", [1, 7, 100])
def test_images_are_predicted_and_files_that_are_none_are_dead_letters(
    repository: Path, tmp_path: Path, images: Path, files_per_shard: int
) -> None:
    spec = image_job(repository, images, tmp_path / "out", row_position=True)
    outcomes, totals = run_images(spec, files_per_shard)
    assert [outcome.error for outcome in outcomes] == [None] * len(outcomes)
    assert (totals.rows_in, totals.rows_out, totals.dead_letters) == (30, 27, 3)
    got = written(tmp_path / "out")
    kept = [number for number in range(30) if number not in (5, 11, 12)]
    paths = [f"half={number // 15}/{number:02}.png" for number in kept]
    assert got["path"].to_pylist() == got["_file"].to_pylist() == paths
    assert got["half"].to_pylist() == [number // 15 for number in kept]
    assert set(got["_row"].to_pylist()) == {0}
    assert "image" not in got.column_names
    np.testing.assert_allclose(
        np.array(got["means"].to_pylist()) * 255, [colour(number) for number in kept], atol=1e-3
    )
    found = letters(tmp_path / "out")
    assert [set(letter) for letter in found] == [{"file", "code", "reason"}] * 3
    assert [letter["file"] for letter in found] == [
        "half=0/05.png",
        "half=0/11.png",
        "half=0/12.png",
    ]
    assert {letter["code"] for letter in found} == {"unreadable_row"}


def test_images_are_written_to_the_folder_that_they_come_from(
    repository: Path, tmp_path: Path, images: Path
) -> None:
    _, totals = run_images(image_job(repository, images, tmp_path / "out", partitioned=True), 10)
    assert totals.rows_out == 27
    for half, rows in ((0, 12), (1, 15)):
        files = (tmp_path / "out" / f"half={half}").glob("*.parquet")
        part = pa.concat_tables(pq.ParquetFile(file).read() for file in files)
        assert part.num_rows == rows
        assert set(part["half"].to_pylist()) == {half}
    assert not list((tmp_path / "out").glob("*.parquet"))


def test_what_is_predicted_need_not_be_written(repository: Path, tmp_path: Path) -> None:
    """For a look at a job before it is run."""
    source = tmp_path / "rows.parquet"
    pq.write_table(table(), source, row_group_size=ROWS)
    spec = job(repository, source, tmp_path / "out")
    listing = list_inputs(spec.input.uri, format=None, columns=["id", *"abcd"])
    worker = ShardWorker(spec, listing, OutputFolder(*open_filesystem(spec.output.uri)))
    worker.load()
    shards = plan_shards(listing.files, target_rows=ROWS // 100, target_bytes=1)
    assert len(shards) == 13
    got: list[int] = []
    for shard in shards:
        for part, _ in worker.predict(shard):
            assert part is not None
            got += part["id"].to_pylist()
    worker.close()
    assert got == list(range(ROWS))
    assert not (tmp_path / "out").exists()
