"""A replica whose device has too little memory: what clients get, and what it tells of itself."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from rayprism.core.tensors import Datatype, TensorSpec
from rayprism.models.manifest import Batching
from rayprism.models.push import push_model
from rayprism.models.repository import ModelVersion, Repository
from tests.serving.conftest import serving, write_code
from tests.support.asyncs import async_test
from tests.support.recorded import Recorded

CODE = """
import time


class Model:
    def __init__(self, folder, options):
        pass

    def predict(self, inputs):
        x = inputs["x"]
        time.sleep(0.002)  # others come meanwhile
        if len(x) > 3 or (x > 1000).any():
            raise MemoryError("CUDA out of memory")
        return {"y": 2 * x}
"""


@pytest.fixture(scope="module")
def tight(repository: Repository, tmp_path_factory: pytest.TempPathFactory) -> ModelVersion:
    """Takes three rows at once, and no number over 1000 at all."""
    return push_model(
        repository,
        "tight",
        write_code(tmp_path_factory.mktemp("tight"), CODE),
        example={"x": np.zeros((1, 2), np.float32).tolist()},
        code="model.py:Model",
        inputs=[TensorSpec("x", Datatype.FP32, (-1, 2))],
        outputs=[TensorSpec("y", Datatype.FP32, (-1, 2))],
        batching=Batching(max_rows=12),
        allow_code=True,
    ).version


def body(*values: float) -> dict[str, object]:
    data = [value for value in values for _ in range(2)]
    tensor = {"name": "x", "datatype": "FP32", "shape": [len(values), 2], "data": data}
    return {"inputs": [tensor]}


@async_test
async def test_no_client_is_told_of_batches_that_did_not_fit(tight: ModelVersion) -> None:
    async with serving(tight, allow_code=True) as (service, client):
        seen = Recorded(service.telemetry.recorder)
        counted = ("rayprism_out_of_memory_batches_total", "version")
        limit = ("rayprism_batch_limit_ratio", "version")
        assert seen.series(*counted) == {("1",): 0}, "from 0, so that the first is an increase"
        assert seen.gauges(*limit) == {("1",): 1.0}
        answers = await asyncio.gather(
            *(client.post("/infer", json=body(value)) for value in range(20)),
            client.post("/infer", json=body(*range(30))),
        )
        assert {answer.status_code for answer in answers} == {200}
        firsts = [answer.json()["outputs"][0]["data"][0] for answer in answers]
        assert firsts == [2.0 * value for value in range(20)] + [0]
        assert answers[-1].json()["outputs"][0]["data"][::2] == [2.0 * value for value in range(30)]
        assert seen.counts(*counted)[("1",)] >= 1
        # By what came first: a batch of four or five leaves two rows, one of six or more three.
        assert seen.gauges(*limit)[("1",)] in (2 / 12, 3 / 12)
        service.check_health()


@async_test
async def test_a_row_that_can_never_fit_gets_a_clear_error_alone(tight: ModelVersion) -> None:
    async with serving(tight, allow_code=True) as (_, client):
        bad, *good = await asyncio.gather(
            client.post("/infer", json=body(5000)),
            *(client.post("/infer", json=body(value)) for value in range(5)),
        )
        assert {answer.status_code for answer in good} == {200}
        assert bad.status_code == 500
        assert bad.json()["error"].startswith("a single row of this request does not fit into the")
