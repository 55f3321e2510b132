"""Models for a GPU: the tests' own MLP, and one whose memory grows with its rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayprism.models.gpu import Gpu, GpuFacts, read_gpu
from rayprism.models.manifest import Batching
from rayprism.models.push import push_model
from rayprism.models.repository import ModelVersion, Repository
from tests.support.models import save_onnx

ROW_BYTES = 64 * 1024**2
"""What a row of `wide` takes on its way through, at least."""
MOST_ROWS = 64
_LENGTH = ROW_BYTES // 4


@pytest.fixture(scope="session")
def facts() -> GpuFacts:
    """The GPU of this machine."""
    return read_gpu(0)


@pytest.fixture(scope="session")
def part(facts: GpuFacts) -> Gpu:
    """A part of it that holds some 20 rows of `wide`, and not 64."""
    return Gpu(0, (512 * 1024**2 + 30 * ROW_BYTES) / facts.total_bytes)


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path / "models")


def save_wide_onnx(path: Path) -> Path:
    """x [rows, 1] spread out to 64 MiB a row, and its mean: x again."""
    from onnx import TensorProto, helper, numpy_helper

    node = helper.make_node
    return save_onnx(
        path,
        [
            node("Expand", ["x", "shape"], ["wide"]),
            node("ReduceMean", ["wide"], ["y"], axes=[1], keepdims=1),
        ],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 1])],
        [numpy_helper.from_array(np.array([1, _LENGTH], np.int64), "shape")],
    )


def save_wide_torch(path: Path) -> Path:
    """The same."""
    import torch

    class Wide(torch.nn.Module):  # type: ignore[misc]
        def forward(self, x: Any) -> Any:
            return {"y": x.repeat(1, _LENGTH).mean(dim=1, keepdim=True)}

    rows = {"x": {0: torch.export.Dim("rows")}}
    program = torch.export.export(Wide(), (torch.ones(2, 1),), dynamic_shapes=rows)
    torch.export.save(program, str(path))
    return path


@pytest.fixture(params=["onnx", "torch"])
def wide(request: pytest.FixtureRequest, repository: Repository, tmp_path: Path) -> ModelVersion:
    """A version that gives back what it is given, and takes 64 MiB for each row meanwhile."""
    if request.param == "onnx":
        source = save_wide_onnx(tmp_path / "wide.onnx")
    else:
        source = save_wide_torch(tmp_path / "wide.pt2")
    return push_model(
        repository,
        "wide",
        source,
        example={"x": [[0.5], [0.25]]},
        batching=Batching(max_rows=MOST_ROWS),
    ).version


def wide_rows(count: int) -> Any:
    """Different rows for `wide`. Shapes: `[rows, 1] float32`."""
    return (np.arange(count, dtype=np.float32) / 64).reshape(count, 1)
