"""Whole shards: from files to committed files, with a real model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import csv

from rayprism.core.shards import plan_shards
from rayprism.models.push import push_model
from rayprism.models.repository import Repository
from rayprism.offline.commits import OutputFolder, Totals
from rayprism.offline.files import list_inputs, open_filesystem
from rayprism.offline.spec import JobSpec, parse_spec
from rayprism.offline.worker import Outcome, ShardWorker
from tests.support.models import mlp_example, mlp_reference, save_mlp

ROWS = 5000


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny` 1: input `x` FP32 [-1, 4], output `y` FP32 [-1, 3]."""
    folder = tmp_path_factory.mktemp("offline-models")
    path = save_mlp(folder / "tiny.onnx")
    push_model(Repository(folder / "models"), "tiny", path, example=mlp_example())
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
    output.begin(spec.identity(), len(shards))
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
    output.begin(spec.identity(), len(shards))
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
