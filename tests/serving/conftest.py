"""Loaded models and the applications around them, without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from rayprism.models.loader import load_model
from rayprism.models.push import push_model
from rayprism.models.repository import ModelVersion, Repository
from rayprism.serving.http import ModelApp
from rayprism.serving.service import ModelService
from rayprism.serving.settings import UserConfig
from tests.support.models import mlp_example, save_mlp

Client = Callable[..., Any]


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    root = tmp_path_factory.mktemp("serving")
    return Repository(root / "models")


@pytest.fixture(scope="session")
def tiny(repository: Repository, tmp_path_factory: pytest.TempPathFactory) -> ModelVersion:
    """An MLP: input `x` FP32 [-1, 4], output `y` FP32 [-1, 3]."""
    path = save_mlp(tmp_path_factory.mktemp("tiny") / "tiny.onnx")
    return push_model(repository, "tiny", path, example=mlp_example()).version


@asynccontextmanager
async def serving(
    version: ModelVersion, *, allow_code: bool = False, **config: Any
) -> AsyncIterator[tuple[ModelService, httpx.AsyncClient]]:
    """The real application of a version, called in process."""
    model = await asyncio.to_thread(load_model, version, allow_code=allow_code)
    service = ModelService(model, UserConfig(**config))
    transport = httpx.ASGITransport(app=ModelApp(service))  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield service, client
    await service.close()


def write_code(folder: Path, text: str) -> Path:
    """A folder with one Python model in it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.py").write_text(text)
    return folder


class GrpcContext:
    """Stands for Ray's gRPC context: records what a method puts on it."""

    def __init__(self, request_id: str | None = "r-1", **metadata: str) -> None:
        self.code: Any = None
        self.details = ""
        self.trailing: list[tuple[str, str]] = []
        self._request_id = request_id
        self._metadata = [(key.replace("_", "-"), value) for key, value in metadata.items()]

    def invocation_metadata(self) -> list[tuple[str, str]]:
        return self._metadata

    def trailing_metadata(self) -> list[tuple[str, str]]:
        return self.trailing

    def request_id(self) -> str | None:
        return self._request_id

    def set_code(self, code: Any) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        self.details = details

    def set_trailing_metadata(self, trailing: list[tuple[str, str]]) -> None:
        self.trailing = trailing
