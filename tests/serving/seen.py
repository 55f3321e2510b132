"""Three versions of a model that does what its rows ask for, and requests of both protocols."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import numpy as np

from rayprism.core.tensors import Datatype, RaggedAxis, TensorSpec
from rayprism.models.manifest import Batching
from rayprism.models.push import push_model
from rayprism.models.repository import ModelVersion, Repository
from rayprism.protocol import grpc as codec
from tests.serving.conftest import GrpcContext, write_code
from tests.support.versions import Member

FAIL, FAIL_CANDIDATE = 1.0, 2.0
"""What the first value of a row asks for: an error of every version, or of the candidate."""

CODE = """
class Model:
    def __init__(self, folder, options):
        self.version = options["version"]

    def predict(self, inputs):
        x = inputs["x"]
        asked = x[:, 0]
        if (asked == 1).any() or (self.version == 2 and (asked == 2).any()):
            raise RuntimeError("as it was asked to")
        return {"y": x}
"""


def push_seen(repository: Repository, folder: Path, model: str = "seen") -> list[ModelVersion]:
    """Versions 1 to 3. Rows are ragged, and the answer is what was sent."""
    return [
        push_model(
            repository,
            model,
            write_code(folder / str(number), CODE),
            example={"x": np.zeros((1, 2), np.float32).tolist()},
            code="model.py:Model",
            inputs=[TensorSpec("x", Datatype.FP32, (-1, -1))],
            outputs=[TensorSpec("y", Datatype.FP32, (-1, -1))],
            options={"version": number},
            batching=Batching(max_rows=8, ragged={"x": RaggedAxis(1)}, ragged_outputs={"y": 1}),
            allow_code=True,
        ).version
        for number in (1, 2, 3)
    ]


def splits(weight: float = 100, **traffic: Any) -> dict[str, Any]:
    return {"traffic": {"candidates": [{"version": 2, "weight": weight}], **traffic}}


def copies(*shadows: int) -> dict[str, Any]:
    return {"traffic": {"shadow": [{"version": version, "sample": 100} for version in shadows]}}


async def ask(
    member: Member,
    protocol: str,
    asked: float = 0.0,
    *,
    rows: int = 1,
    length: int = 2,
    shape: tuple[int, ...] | None = None,
    **metadata: str,
) -> tuple[bool, str]:
    """Whether a request is answered, and which version says so.

    Args:
        member: Who is asked.
        protocol: How.
        asked: What its rows ask for.
        rows: How many.
        length: Of each.
        shape: In the place of both.
        metadata: Or headers.
    """
    x = np.full(shape or (rows, length), asked, np.float32)
    if protocol == "http":
        tensor = {"name": "x", "datatype": "FP32", "shape": x.shape, "data": x.ravel().tolist()}
        headers = {name.replace("_", "-"): value for name, value in metadata.items()}
        path = f"/v2/models/{member.service.model_name}/infer"
        got = await member.client.post(path, json={"inputs": [tensor]}, headers=headers)
        return got.status_code == 200, got.headers["x-rayprism-version"]
    request = codec.ModelInferRequest(model_name=member.service.model_name)
    request.inputs.add(name="x", datatype="FP32", shape=x.shape)
    request.raw_input_contents.append(x.tobytes())
    context = GrpcContext("r-1", **metadata)
    answer = await member.methods.ModelInfer(request, context)
    assert (context.code is None) == bool(answer.SerializeToString())
    return context.code is None, dict(context.trailing)["x-rayprism-version"]


def asking(
    member: Member, protocol: str, *args: Any, **kwargs: Any
) -> asyncio.Task[tuple[bool, str]]:
    """The same, in a task."""
    return asyncio.create_task(ask(member, protocol, *args, **kwargs))


class Gate:
    """Holds batches of a member back until it is opened."""

    def __init__(self, member: Member) -> None:
        scheduler = member.service.scheduler
        self._model = scheduler._model
        scheduler._model = self
        self.measured_run_s = self._model.measured_run_s
        self.entered = 0
        self.open = threading.Event()

    def run(self, batch: Any) -> Any:
        self.entered += 1
        assert self.open.wait(20)
        return self._model.run(batch)
