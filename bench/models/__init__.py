"""The models that servers are measured with."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from bench.models.base import BenchModel, ModelFiles, ModelUnavailable
from bench.models.images import IMAGES
from bench.models.minilm import MINILM
from bench.models.ragged import RAGGED
from bench.models.tiny import TINY
from bench.models.vision import VISION

__all__ = ["MODELS", "BenchModel", "ModelFiles", "ModelUnavailable"]

MODELS: Mapping[str, BenchModel] = MappingProxyType(
    {model.name: model for model in (TINY, MINILM, IMAGES, RAGGED, VISION)}
)
