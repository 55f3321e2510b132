"""What counts as another signature, and how it is told."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest

from rayprism.core.tensors import Array, Datatype, TensorSpec, numpy_dtype
from rayprism.models.manifest import FileEntry, Golden, Manifest, TensorValue
from rayprism.models.signature import signature_differences

X = TensorSpec("x", Datatype.FP32, (-1, 4))
MASK = TensorSpec("mask", Datatype.INT64, (-1, -1))
Y = TensorSpec("y", Datatype.FP32, (-1, 3))


def example_array(spec: TensorSpec) -> Array:
    nothing = b"" if spec.datatype is Datatype.BYTES else 0
    return np.full(np.abs(spec.shape), nothing, numpy_dtype(spec.datatype))


def manifest(
    inputs: Sequence[TensorSpec] = (X, MASK), outputs: Sequence[TensorSpec] = (Y,), version: int = 1
) -> Manifest:
    """One of a version with the given signature."""

    def example(specs: Sequence[TensorSpec]) -> tuple[TensorValue, ...]:
        return tuple(TensorValue.from_array(spec.name, example_array(spec)) for spec in specs)

    return Manifest(
        model="tiny",
        version=version,
        created="2026-01-02T03:04:05+00:00",
        runtime="onnx",
        file="model.onnx",
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        golden=Golden(inputs=example(inputs), outputs=example(outputs)),
        files={"model.onnx": FileEntry(sha256="0" * 64, size_bytes=version)},
    )


def test_a_version_has_its_own_signature() -> None:
    assert signature_differences(manifest(), manifest(version=2)) == []


def test_order_and_words_do_not_matter() -> None:
    described = TensorSpec("x", Datatype.FP32, (-1, 4), description="four numbers")
    assert signature_differences(manifest(), manifest((MASK, described))) == []


DIFFERENCES = [
    # the other version's inputs and outputs, and what is said
    ((X,), (Y,), ["input 'mask' is gone"]),
    (
        (X, MASK, TensorSpec("age", Datatype.UINT8, (-1,))),
        (Y,),
        ["input 'age' is new"],
    ),
    (
        (TensorSpec("x", Datatype.FP64, (-1, 4)), MASK),
        (Y,),
        ["input 'x' is FP64 [-1, 4], was FP32 [-1, 4]"],
    ),
    (
        (TensorSpec("x", Datatype.FP32, (-1, 5)), MASK),
        (Y,),
        ["input 'x' is FP32 [-1, 5], was FP32 [-1, 4]"],
    ),
    (
        (TensorSpec("x", Datatype.FP32, (-1, -1)), MASK),
        (Y,),
        ["input 'x' is FP32 [-1, -1], was FP32 [-1, 4]"],
    ),
    (
        (TensorSpec("x", Datatype.FP32, (-1, 4, 1)), MASK),
        (Y,),
        ["input 'x' is FP32 [-1, 4, 1], was FP32 [-1, 4]"],
    ),
    (
        (TensorSpec("x", Datatype.FP32, (-1, 4), allow_nan=False), MASK),
        (Y,),
        ["input 'x' is FP32 [-1, 4] without NaN, was FP32 [-1, 4]"],
    ),
    ((X, MASK), (Y, TensorSpec("z", Datatype.BOOL, (-1,))), ["output 'z' is new"]),
    (
        (X, MASK),
        (TensorSpec("scores", Datatype.FP32, (-1, 3)),),
        ["output 'y' is gone", "output 'scores' is new"],
    ),
    (
        (X, MASK),
        (TensorSpec("y", Datatype.BYTES, (-1, 3)),),
        ["output 'y' is BYTES [-1, 3], was FP32 [-1, 3]"],
    ),
    (
        (Y, TensorSpec("mask", Datatype.INT32, (-1, -1))),
        (X,),
        [
            "input 'x' is gone",
            "input 'y' is new",
            "input 'mask' is INT32 [-1, -1], was INT64 [-1, -1]",
            "output 'y' is gone",
            "output 'x' is new",
        ],
    ),
]


@pytest.mark.parametrize(("inputs", "outputs", "want"), DIFFERENCES)
def test_each_difference_is_told(
    inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], want: list[str]
) -> None:
    assert signature_differences(manifest(), manifest(inputs, outputs, 2)) == want


@pytest.mark.parametrize(("inputs", "outputs", "_"), DIFFERENCES)
def test_there_and_back_differ_alike(
    inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], _: list[str]
) -> None:
    other = manifest(inputs, outputs, 2)
    there, back = signature_differences(manifest(), other), signature_differences(other, manifest())
    assert len(there) == len(back) > 0


def test_nan_is_of_no_matter_where_there_is_none() -> None:
    """Integers have no NaN, whatever a manifest says of it."""
    strict = TensorSpec("mask", Datatype.INT64, (-1, -1), allow_nan=False)
    assert signature_differences(manifest(), manifest((X, strict))) == []


def test_many_inputs_in_any_order() -> None:
    specs = [TensorSpec(f"x{number}", Datatype.FP32, (-1, number + 1)) for number in range(20)]
    shuffled = random.Random(1).sample(specs, len(specs))
    assert signature_differences(manifest(specs), manifest(shuffled)) == []
