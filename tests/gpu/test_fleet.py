"""Replicas and batch actors that share a GPU, in a real Ray cluster."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from rayprism.models.gpu import Gpu
from rayprism.models.manifest import Batching
from rayprism.models.push import push_model
from rayprism.models.repository import Repository
from tests.gpu.conftest import MOST_ROWS, save_wide_onnx, wide_rows
from tests.support.cuda import needs_gpu
from tests.support.fleet import Fleet, model_application, running_fleet

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.cluster,
    pytest.mark.e2e,
    needs_gpu,
    pytest.mark.timeout(600),
]

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`wide` 1: gives back what it is given, and takes 64 MiB for each row meanwhile."""
    folder = tmp_path_factory.mktemp("gpu-models")
    push_model(
        Repository(folder / "models"),
        "wide",
        save_wide_onnx(folder / "wide.onnx"),
        example={"x": [[0.5], [0.25]]},
        batching=Batching(max_rows=MOST_ROWS),
    )
    return folder / "models"


@pytest.fixture(scope="module")
def fleet(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with running_fleet(models, tmp_path_factory.mktemp("gpu-fleet"), haproxy=True) as fleet:
        yield fleet


def application(gpus: float, replicas: int) -> dict[str, Any]:
    made = model_application("wide", 1, replicas=replicas)
    made["deployments"][0]["ray_actor_options"]["num_gpus"] = gpus
    return made


def post(fleet: Fleet, rows: int) -> httpx.Response:
    x = wide_rows(rows)
    tensor = {"name": "x", "datatype": "FP32", "shape": list(x.shape), "data": x.ravel().tolist()}
    url = f"{fleet.url}/v2/models/wide/infer"
    return httpx.post(url, json={"inputs": [tensor]}, timeout=60)


def test_two_replicas_share_a_gpu_and_nobody_sees_that_batches_do_not_fit(
    fleet: Fleet, part: Gpu
) -> None:
    """Full batches are larger than the part that each has: they are halved, and all answered."""
    # Ray counts GPUs in ten thousandths.
    gpus = max(round(part.share, 4), 0.0001)
    fleet.deploy([application(gpus, 2)])
    assert len(fleet.replica_pids("wide")) == 2
    with ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(lambda _: post(fleet, MOST_ROWS), range(40)))
    assert {answer.status_code for answer in answers} == {200}
    for answer in answers:
        given = answer.json()["outputs"][0]["data"]
        np.testing.assert_allclose(given, wide_rows(MOST_ROWS).ravel(), rtol=1e-4)
    assert len(fleet.replica_pids("wide")) == 2, "none of them died"


def test_a_batch_job_shares_it_too(models: Path, part: Gpu, tmp_path: Path) -> None:
    x = wide_rows(1000)
    pq.write_table(pa.table({"x": x.ravel()}), tmp_path / "in.parquet")
    job = {
        "model": "wide",
        "version": 1,
        "repository": str(models),
        "device": "cuda",
        "input": {"uri": str(tmp_path / "in.parquet")},
        "output": {"uri": str(tmp_path / "out"), "passthrough": ["x"]},
        "pool": {"max_actors": 2, "cpus": 0.5, "gpus": max(round(part.share, 4), 0.0001)},
        "limits": {"max_dead_letters": 0},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    done = subprocess.run(
        [sys.executable, str(ROOT / "batch/predict.py"), str(tmp_path / "job.yaml"), "--local"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env=os.environ | {"RAY_AUTH_MODE": "disabled"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    table = pq.read_table(tmp_path / "out")
    assert table.num_rows == 1000
    given = np.ravel(table["y"].to_pylist())
    np.testing.assert_allclose(given, table["x"].to_numpy(), rtol=1e-4)
