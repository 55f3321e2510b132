"""A batch job that loses a node writes what an undisturbed one writes."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from bench.batch.chaos import differences
from tests.nodes.cluster import Cluster
from tests.nodes.conftest import Figures
from tests.nodes.machines import HOME
from tests.support.fleet import wait_for

pytestmark = [pytest.mark.nodes, pytest.mark.timeout(600)]

_ROOT = Path(__file__).resolve().parents[2]
_ROWS, _GROUP_ROWS = 60_000, 500


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """What all machines see as /mnt/data."""
    folder = tmp_path / "data"
    folder.mkdir()
    values = np.random.default_rng(5).standard_normal((_ROWS, 4)).astype(np.float32)
    table = pa.table(
        {"id": range(_ROWS), "x": pa.FixedSizeListArray.from_arrays(values.ravel(), 4)}
    )
    pq.write_table(table, folder / "in.parquet", row_group_size=_GROUP_ROWS)
    return folder


@pytest.fixture
def cluster(tmp_path: Path, models: Path, shared: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path, models, mounts={"/mnt/data": shared})
    try:
        cluster.start_head()
        for number in (2, 3):
            cluster.start_worker(number)
        yield cluster
    finally:
        cluster.stop()


def write_job(shared: Path, name: str) -> None:
    document = {
        "model": "tiny",
        "version": "1",
        "input": {"uri": "/mnt/data/in.parquet"},
        "output": {"uri": f"/mnt/data/{name}", "passthrough": ["id"]},
        # An actor on each worker.
        "pool": {"min_actors": 2, "max_actors": 2, "cpus": 2},
        # Small shards and single rows, so that there is time to lose something.
        "limits": {"shard_rows": 3 * _GROUP_ROWS, "batch_rows": 1},
    }
    (shared / f"{name}.yaml").write_text(yaml.safe_dump(document))


def start_job(cluster: Cluster, name: str) -> subprocess.Popen[str]:
    script = (
        "export RAY_AUTH_MODE=token RAYPRISM_REPOSITORY=/mnt/models; "
        f"RAY_ADDRESS={cluster.head.address}:6379 exec {HOME}/venv/bin/python "
        f"{_ROOT}/batch/predict.py /mnt/data/{name}.yaml"
    )
    return subprocess.Popen(
        cluster.head.command(script),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_node_is_lost(cluster: Cluster, shared: Path, figures: Figures) -> None:
    seconds = {}
    for name in ("calm", "disturbed"):
        write_job(shared, name)
        began_s = time.monotonic()
        job = start_job(cluster, name)
        if name == "disturbed":
            done = shared / name / "_shards"
            wait_for(lambda done=done: len(list(done.glob("*.json"))) >= 4, 90)
            cluster.workers[0].kill()
            assert not (shared / name / "_SUCCESS").exists(), "lost too late"
        told, _ = job.communicate(timeout=240)
        assert job.returncode == 0, told
        seconds[name] = time.monotonic() - began_s
    assert list(differences(shared / "calm", shared / "disturbed")) == []
    totals = json.loads((shared / "disturbed/_SUCCESS").read_text())
    assert (totals["rows_in"], totals["rows_out"], totals["dead_letters"]) == (_ROWS, _ROWS, 0)
    figures.add_job("a batch job loses one of two nodes", _ROWS, **seconds)
