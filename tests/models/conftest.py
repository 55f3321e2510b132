"""One MLP in every form that rayprism serves, so that one suite can run on all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from rayprism.core.tensors import Datatype, TensorSpec
from rayprism.models.push import PushResult, push_model
from rayprism.models.repository import Repository
from tests.support import models

X_SPEC = TensorSpec("x", Datatype.FP32, (-1, models.FEATURES))
Y_SPEC = TensorSpec("y", Datatype.FP32, (-1, models.OUTPUTS))


@dataclass(frozen=True)
class Case:
    """One form of the MLP.

    Args:
        name: Of the case.
        build: Makes the source in a folder and returns it.
        file: The model file in the version.
        needs_code: Whether it loads only with `allow_code`.
        push: Further arguments of `push_model`.
    """

    name: str
    build: Callable[[Path, int], Path]
    file: str
    needs_code: bool = False
    push: dict[str, Any] = field(default_factory=dict)


def _processor(folder: Path, seed: int) -> Path:
    (folder / "processor.py").write_text(models.PROCESSOR)
    return models.save_mlp(folder / "model.onnx", seed=seed, x="features", y="scores")


CASES = [
    Case("onnx", lambda f, s: models.save_mlp(f / "model.onnx", seed=s), "model.onnx"),
    Case("export", lambda f, s: models.save_mlp_export(f / "model.pt2", seed=s), "model.pt2",
         push={"outputs": [Y_SPEC]}),
    Case("script", lambda f, s: models.save_mlp_script(f / "model.pt", seed=s), "model.pt", True,
         push={"inputs": [X_SPEC], "outputs": [Y_SPEC]}),
    Case("python", lambda f, s: models.save_python_mlp(f / "model", seed=s), "model.py", True,
         push={"inputs": [X_SPEC], "outputs": [Y_SPEC]}),
    Case("processor", _processor, "model.onnx", True,
         push={"code": "processor.py:Processor", "inputs": [X_SPEC], "outputs": [Y_SPEC]}),
]  # fmt: skip


@dataclass
class Form:
    """A case with its built sources, and pushes of it."""

    case: Case
    sources: dict[int, Path]

    def push(self, repository: Repository, *, seed: int = 0, **overrides: Any) -> PushResult:
        """Pushes the MLP of a seed as the model `mlp`."""
        arguments: dict[str, Any] = {
            "example": models.mlp_example(),
            "allow_code": self.case.needs_code,
            **self.case.push,
            **overrides,
        }
        return push_model(repository, "mlp", self.sources[seed], **arguments)


@pytest.fixture(scope="session", params=CASES, ids=lambda case: case.name)
def form(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Form:
    """Every form of the MLP in turn."""
    sources = {}
    for seed in (0, 1):
        folder = tmp_path_factory.mktemp(f"{request.param.name}-{seed}")
        sources[seed] = request.param.build(folder, seed)
    return Form(request.param, sources)


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    """An empty repository."""
    return Repository(tmp_path / "repository")


@pytest.fixture
def mlp_onnx(tmp_path: Path) -> Path:
    """The MLP as ONNX."""
    return models.save_mlp(tmp_path / "mlp.onnx")
