"""The manifests as `kubectl apply -k` would send them, built once."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

with warnings.catch_warnings():
    # Ray's own use of pydantic.
    warnings.simplefilter("ignore", DeprecationWarning)
    import ray.serve.schema  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def kubernetes() -> ModuleType:
    """docker/kubernetes/check.py."""
    path = ROOT / "docker" / "kubernetes" / "check.py"
    spec = importlib.util.spec_from_file_location("check_kubernetes", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # pydantic looks there for what annotations name
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def overlays(kubernetes: ModuleType) -> dict[str, list[dict[str, Any]]]:
    return {
        name: kubernetes.build(kubernetes.FOLDER / "overlays" / name) for name in ("cpu", "gpu")
    }


@pytest.fixture(params=["cpu", "gpu"])
def manifests(
    request: pytest.FixtureRequest, overlays: dict[str, list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Each overlay in turn."""
    return overlays[request.param]
