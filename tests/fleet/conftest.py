"""Repositories that are quick to make: the checks read manifests, and run no model."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest

from rayprism.core.tensors import Datatype, TensorSpec
from rayprism.models.manifest import Code, Golden, Manifest, TensorValue
from rayprism.models.repository import ModelVersion, Repository, describe_files

with warnings.catch_warnings():
    # Ray's own, while it is imported: not what these tests are about.
    warnings.simplefilter("ignore")
    import ray.serve.schema  # noqa: F401


def push_fake(root: Path, model: str, *, code: bool = False) -> ModelVersion:
    """Adds a version whose manifest is right and whose model file is not one."""
    x = np.ones((1, 2), np.float32)

    def write(number: int, folder: Path) -> Manifest:
        (folder / "model.onnx").write_bytes(f"{model} {number}".encode())
        if code:
            (folder / "processor.py").write_text("class Processor: ...\n")
        return Manifest(
            model=model,
            version=number,
            created="2026-01-02T03:04:05+00:00",
            runtime="onnx",
            file="model.onnx",
            code=Code(file="processor.py", class_name="Processor") if code else None,
            inputs=(TensorSpec("x", Datatype.FP32, (-1, 2)),),
            outputs=(TensorSpec("y", Datatype.FP32, (-1, 2)),),
            golden=Golden(
                inputs=(TensorValue.from_array("x", x),), outputs=(TensorValue.from_array("y", x),)
            ),
            files=describe_files(folder),
        )

    return Repository(root).add_version(model, write)


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`flights` 1 and 2, `coded` 1 which brings code, `spoilt` 1 whose file was changed."""
    root = tmp_path_factory.mktemp("repository")
    push_fake(root, "flights")
    push_fake(root, "flights")
    push_fake(root, "coded", code=True)
    file = push_fake(root, "spoilt").folder / "model.onnx"
    file.chmod(0o644)
    file.write_bytes(b"something else")
    broken = push_fake(root, "broken").folder / "manifest.json"
    broken.chmod(0o644)
    broken.write_text('{"manifest_version": 1}')
    return root
