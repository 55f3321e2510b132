"""`batch/predict.py` as users run it: on a laptop, on a cluster, stopped and killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from bench.batch.chaos import Chaos, differences
from rayprism.core.tensors import Array, Datatype, TensorSpec
from rayprism.models.push import push_model
from rayprism.models.repository import Repository
from tests.support.fleet import Fleet, running_fleet, wait_for
from tests.support.models import mlp_example, mlp_reference, save_mlp

pytestmark = [pytest.mark.cluster, pytest.mark.e2e, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
ROWS, GROUP_ROWS = 60_000, 500
BAD = (17, 40_000)
"""Rows with a text that is no number."""

# Predicts, but ends its process for rows that begin with a marker.
CRASHING = """
import os
import numpy as np

class Crashing:
    def __init__(self, folder, options):
        pass

    def predict(self, inputs):
        if (inputs["x"][:, 0] == 666).any():
            os.kill(os.getpid(), 9)
        return {"y": np.zeros((len(inputs["x"]), 3), np.float32)}
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny` 1: input `x` FP32 [-1, 4], output `y` FP32 [-1, 3]; `crashing` 1: the same."""
    folder = tmp_path_factory.mktemp("predict-models")
    models = Repository(folder / "models")
    push_model(models, "tiny", save_mlp(folder / "tiny.onnx"), example=mlp_example())
    code = folder / "crashing"
    code.mkdir()
    (code / "model.py").write_text(CRASHING)
    push_model(
        models,
        "crashing",
        code,
        example={"x": np.zeros((1, 4), np.float32).tolist()},
        code="model.py:Crashing",
        inputs=[TensorSpec("x", Datatype.FP32, (-1, 4))],
        outputs=[TensorSpec("y", Datatype.FP32, (-1, 3))],
        allow_code=True,
    )
    return folder / "models"


def rows() -> Array:
    return np.random.default_rng(5).standard_normal((ROWS, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two Parquet files of many small row groups; column `a` is text, and two of its rows bad."""
    folder = tmp_path_factory.mktemp("predict-data") / "in"
    folder.mkdir()
    columns: dict[str, Any] = {name: rows()[:, index] for index, name in enumerate("abcd")}
    columns["a"] = [repr(float(value)) for value in columns["a"]]
    for bad in BAD:
        columns["a"][bad] = "many"
    table = pa.table({"id": pa.array(range(ROWS)), **columns})
    for part, start in enumerate((0, ROWS // 2)):
        part_path = folder / f"{part}.parquet"
        pq.write_table(table.slice(start, ROWS // 2), part_path, row_group_size=GROUP_ROWS)
    return folder


def write_job(path: Path, repository: Path, data: Path, output: Path, **more: Any) -> Path:
    document = {
        "model": "tiny",
        "version": "1",
        "repository": str(repository),
        "input": {"uri": str(data), "columns": {"x": list("abcd")}},
        "output": {"uri": str(output), "passthrough": ["id"]},
        "pool": {"max_actors": 2, "cpus": 0.5},
        "limits": {"shard_rows": 3 * GROUP_ROWS, "batch_rows": 16},
    }
    path.write_text(yaml.safe_dump(document | more))
    return path


def predict(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env=os.environ | environment,
    )


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, str(ROOT / "batch/predict.py"), *map(str, arguments)]


def check_output(folder: Path) -> None:
    """Every row is there once with the right prediction, or among the dead letters."""
    table = pa.concat_tables(pq.read_table(part) for part in sorted(folder.glob("part-*.parquet")))
    assert table["id"].to_pylist() == [row for row in range(ROWS) if row not in BAD]
    good = np.delete(rows(), BAD, axis=0)
    found = np.stack(table["y"].to_numpy())
    np.testing.assert_allclose(found, mlp_reference(good), rtol=1e-4, atol=1e-5)
    files = sorted((folder / "_dead_letters").glob("*.jsonl"))
    letters = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert [(item["file"], item["row"]) for item in letters] == [
        ("0.parquet", BAD[0]),
        ("1.parquet", BAD[1] - ROWS // 2),
    ]
    assert all("'many'" in item["reason"] for item in letters)
    totals = json.loads((folder / "_SUCCESS").read_text())
    assert (totals["rows_in"], totals["rows_out"], totals["dead_letters"]) == (ROWS, ROWS - 2, 2)


@pytest.fixture(scope="module")
def calm(repository: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What a run gives that nobody disturbs, on a Ray of its own."""
    folder = tmp_path_factory.mktemp("calm")
    job = write_job(folder / "job.yaml", repository, data, folder / "out")
    done = predict(job, "--local")
    assert done.returncode == 0, done.stderr
    assert "done: 60,000 rows in, 59,998 predicted, 2 dead letters" in done.stdout
    assert "MiB in an actor" in done.stdout
    assert "2 files, 60,000 rows, 40 shards" in done.stderr
    return folder / "out"


def test_a_laptop(calm: Path, repository: Path, data: Path, tmp_path: Path) -> None:
    check_output(calm)
    again = predict(write_job(tmp_path / "job.yaml", repository, data, calm), "--local")
    assert again.returncode == 0, again.stderr
    assert "nothing was left to do" in again.stdout
    other = predict(tmp_path / "job.yaml", "--local", "--set", "output.prefix=p_")
    assert other.returncode == 1
    assert 'output.prefix: was "", is "p_"' in other.stderr
    assert "Traceback" not in other.stderr
    check_output(calm)


def test_the_pipeline_gives_the_same(
    calm: Path, repository: Path, data: Path, tmp_path: Path
) -> None:
    job = write_job(tmp_path / "job.yaml", repository, data, tmp_path / "out", mode="pipeline")
    done = predict(job, "--local")
    assert done.returncode == 0, done.stderr
    check_output(tmp_path / "out")
    assert list(differences(calm, tmp_path / "out")) == []


def test_actors_driver_and_node_are_killed(
    calm: Path, repository: Path, data: Path, tmp_path: Path
) -> None:
    limits = {"shard_rows": 3 * GROUP_ROWS, "batch_rows": 1}
    job = write_job(tmp_path / "job.yaml", repository, data, tmp_path / "out", limits=limits)
    # By default Ray waits for a minute for the head node to come back. Long enough, still, for the
    # job to tell of it first, on a machine that is busy with its neighbours.
    soon = {"RAY_gcs_rpc_server_reconnect_timeout_s": "10"}
    chaos = Chaos(job, tmp_path, repository, seed=3, mean_s=0.5, environment=soon)
    done = chaos.run(["actor", "driver", "actor", "node"])
    assert dict(done.kills) == {"actor": 2, "driver": 1, "node": 1}
    assert done.exits[-1] == 0
    assert "head node" in (tmp_path / f"run-{done.runs - 1}.log").read_text()
    check_output(tmp_path / "out")
    assert list(differences(calm, tmp_path / "out")) == []


def test_a_stop_is_told_and_gone_on_from(repository: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    limits = {"shard_rows": 3 * GROUP_ROWS, "batch_rows": 1}
    job = write_job(tmp_path / "job.yaml", repository, data, output, limits=limits)
    driver = subprocess.Popen(command(job, "--local"), stderr=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        wait_for(lambda: list((output / "_shards").glob("*.json")))
        second = predict(job, "--local")
        assert second.returncode == 1
        assert "another driver writes to this output" in second.stderr
        started = psutil.Process(driver.pid).children(recursive=True)
        driver.send_signal(signal.SIGTERM)
        _, told = driver.communicate(timeout=60)
    finally:
        driver.kill()
        driver.wait()
    assert driver.returncode == 130
    assert "the same command goes on" in told
    _, left = psutil.wait_procs(started, timeout=60)
    assert left == [], "its Ray ends with it"
    assert not (output / "_SUCCESS").exists()
    done = predict(job, "--local")
    assert done.returncode == 0, done.stderr
    assert re.search(r"40 shards; \d+ of them are done already", done.stderr)
    check_output(output)


def test_a_shard_that_kills_its_actors_harms_no_other(repository: Path, tmp_path: Path) -> None:
    values = np.zeros((400, 4), np.float32)
    values[250, 0] = 666
    lists = pa.FixedSizeListArray.from_arrays(values.ravel(), 4)
    table = pa.table({"id": range(400), "x": lists})
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=100)
    job = write_job(
        tmp_path / "job.yaml",
        repository,
        tmp_path / "in.parquet",
        tmp_path / "out",
        model="crashing",
        allow_code=True,
        input={"uri": str(tmp_path / "in.parquet")},
        limits={"shard_rows": 100},
    )
    done = predict(job, "--local")
    assert done.returncode == 1
    assert "1 of 4 shards could not be done" in done.stderr
    assert "died 3 times" in done.stderr
    found = sorted(path.name for path in (tmp_path / "out/_shards").iterdir())
    assert found == ["00000000.json", "00000001.json", "00000003.json"]


def test_a_model_that_cannot_be_loaded_ends_the_job_soon(
    repository: Path, data: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "models"
    models = Repository(broken)
    push_model(models, "tiny", save_mlp(tmp_path / "tiny.onnx"), example=mlp_example())
    manifest = broken / "tiny/1/manifest.json"
    document = json.loads(manifest.read_text())
    document["golden"]["outputs"][0]["data"][0] += 1
    manifest.chmod(0o644)
    manifest.write_text(json.dumps(document))
    done = predict(write_job(tmp_path / "job.yaml", broken, data, tmp_path / "out"), "--local")
    assert done.returncode == 1
    assert "golden" in done.stderr.lower()
    assert "40 of 40 shards could not be done" in done.stderr


# --- on a cluster


@pytest.fixture(scope="module")
def fleet(
    repository: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Fleet]:
    state = tmp_path_factory.mktemp("predict-state")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYPRISM_DATA", str(data.parent))
        with running_fleet(repository, state, haproxy=False) as fleet:
            yield fleet


def submit(fleet: Fleet, working_dir: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    ray = str(Path(sys.executable).with_name("ray"))
    return subprocess.run(
        [
            *(ray, "job", "submit", "--address", fleet.state.dashboard_address),
            *("--working-dir", str(working_dir), "--"),
            *("python", "batch/predict.py", *arguments),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"RAY_AUTH_MODE": "disabled"},
    )


def test_a_ray_job(fleet: Fleet, calm: Path, data: Path, tmp_path: Path) -> None:
    """The copy of --working-dir is thrown away, so relative paths start at RAYPRISM_DATA."""
    (tmp_path / "batch").mkdir()
    (tmp_path / "batch/predict.py").write_bytes((ROOT / "batch/predict.py").read_bytes())
    job = write_job(tmp_path / "job.yaml", Path("/unused"), Path("in/*.parquet"), Path("out/job"))
    document = yaml.safe_load(job.read_text())
    del document["repository"]
    job.write_text(yaml.safe_dump(document))
    done = submit(fleet, tmp_path, "job.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "done: 60,000 rows in" in done.stdout
    check_output(data.parent / "out/job")
    assert list(differences(calm, data.parent / "out/job")) == []


def test_without_a_cluster_it_says_what_to_do(repository: Path, data: Path, tmp_path: Path) -> None:
    job = write_job(tmp_path / "job.yaml", repository, data, tmp_path / "out")
    done = predict(job, RAY_ADDRESS="127.0.0.1:1")
    assert done.returncode == 1
    assert "RAY_ADDRESS is 127.0.0.1:1" in done.stderr
    assert "--local" in done.stderr
    assert "ray job submit" in done.stderr
    assert "Traceback" not in done.stderr
