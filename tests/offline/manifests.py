"""Manifests for models that exist only in a test."""

from __future__ import annotations

from typing import Any

import numpy as np

from rayprism.core.tensors import Datatype, TensorSpec, numpy_dtype
from rayprism.models.manifest import Batching, Code, FileEntry, Golden, Manifest, TensorValue


def manifest(
    inputs: list[TensorSpec],
    outputs: list[TensorSpec],
    *,
    runtime_inputs: tuple[TensorSpec, ...] = (),
    **batching: Any,
) -> Manifest:
    """A manifest of a Python model with these tensors."""
    return Manifest(
        model="m",
        version=3,
        created="2025-01-01T00:00:00+00:00",
        runtime="python",
        file="model.py",
        code=Code(file="model.py", class_name="Model"),
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        runtime_inputs=runtime_inputs,
        batching=Batching(**batching),
        golden=Golden(inputs=tuple(map(_value, inputs)), outputs=tuple(map(_value, outputs))),
        files={"model.py": FileEntry(sha256="0" * 64, size_bytes=1)},
    )


def _value(spec: TensorSpec) -> TensorValue:
    array = np.zeros([max(size, 1) for size in spec.shape], numpy_dtype(spec.datatype))
    if spec.datatype is Datatype.BYTES:
        array[...] = b""
    return TensorValue.from_array(spec.name, array)
