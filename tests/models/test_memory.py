"""Memory that runs out: which errors mean it, and that a model survives it."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, RuntimeException

from rayprism.core.tensors import Datatype, TensorSpec
from rayprism.errors import LoadFailed, OutOfMemory
from rayprism.models.loader import load_model
from rayprism.models.manifest import Batching
from rayprism.models.memory import out_of_memory
from rayprism.models.push import push_model
from rayprism.models.repository import Repository
from tests.support.models import FEATURES, example_rows, mlp_example

torch = pytest.importorskip("torch")

ARENA = (
    "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while running Conv "
    "node. Name:'c' Status Message: /onnxruntime_src/onnxruntime/core/framework/bfc_arena.cc:376 "
    "void* onnxruntime::BFCArena::AllocateRawInternal(size_t, bool) "
)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeException(f"{ARENA}Failed to allocate memory for requested buffer of size 8388608"),
        RuntimeException(f"{ARENA}Available memory of 5 is smaller than requested bytes of 8"),
        Fail("[ONNXRuntimeError] : 1 : FAIL : CUDA failure 2: out of memory ; GPU=0"),
        Fail("[ONNXRuntimeError] : 1 : FAIL : CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
    ],
    ids=lambda error: f"{type(error).__name__}-{str(error)[-20:]}",
)
def test_what_means_that_memory_ran_out(error: Exception) -> None:
    told = out_of_memory(error)
    assert told is not None
    assert told.startswith(f"{type(error).__name__}: ")
    assert len(told) < 340


@pytest.mark.parametrize(
    "error",
    [
        InvalidArgument("[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Got invalid dimensions for x"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ValueError("the list is out of memory cards"),
        OSError(28, "No space left on device"),
    ],
)
def test_what_means_something_else(error: Exception) -> None:
    assert out_of_memory(error) is None


# A model of Python code can be as tight as a test wants it: it raises what torch raises on a GPU.
TIGHT = """
import weakref

import torch


class Tensor:
    pass


class Model:
    def __init__(self, folder, options):
        self.most = options["most"]
        self.kind = {"torch": torch.cuda.OutOfMemoryError, "python": MemoryError}[options["kind"]]
        self.rows = []
        self.tensors = []

    def predict(self, inputs):
        x = inputs["x"]
        self.rows.append(len(x))
        tensor = Tensor()
        self.tensors.append(weakref.ref(tensor))
        if len(x) > self.most:
            raise self.kind("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return {"y": x.sum(axis=1)}
"""
X, Y = TensorSpec("x", Datatype.FP32, (-1, FEATURES)), TensorSpec("y", Datatype.FP32, (-1,))


def push_tight(
    repository: Repository, folder: Path, most: int, kind: str = "torch", **batching: Any
) -> Any:
    (folder / "model.py").write_text(TIGHT)
    return push_model(
        repository,
        "tight",
        folder / "model.py",
        example=mlp_example(1),
        code="model.py:Model",
        inputs=[X],
        outputs=[Y],
        allow_code=True,
        options={"most": most, "kind": kind},
        batching=Batching(**batching),
    ).version


def code_of(model: Any) -> Any:
    return model._runtime._model


@pytest.mark.parametrize("kind", ["torch", "python"])
def test_a_batch_that_does_not_fit_is_told_apart_and_a_smaller_one_runs(
    repository: Repository, tmp_path: Path, kind: str
) -> None:
    model = load_model(push_tight(repository, tmp_path, 8, kind), allow_code=True)
    with pytest.raises(OutOfMemory, match=r"tight 1: out of memory on cpu: \w+: CUDA out of mem"):
        model.run({"x": example_rows(9)})
    np.testing.assert_allclose(
        model.run({"x": example_rows(8)})["y"], example_rows(8).sum(axis=1), rtol=1e-6
    )


def test_nothing_holds_the_tensors_of_the_run_that_failed(
    repository: Repository, tmp_path: Path
) -> None:
    model = load_model(push_tight(repository, tmp_path, 1), allow_code=True)
    gc.disable()
    try:
        with pytest.raises(OutOfMemory) as caught:
            model.run({"x": example_rows(2)})
        assert code_of(model).tensors[-1]() is None
        assert caught.value.__context__ is None
    finally:
        gc.enable()


def test_a_model_is_ready_with_the_batch_that_fits(repository: Repository, tmp_path: Path) -> None:
    version = push_tight(repository, tmp_path, 10, max_rows=64)
    model = load_model(version, allow_code=True)
    assert max(code_of(model).rows) == 64
    assert model.measured_rows == 8
    assert model.notes
    assert "warmed up with 8 of at most 64 rows" in model.notes[0]


def test_a_model_of_which_no_row_fits_says_what_to_do(
    repository: Repository, tmp_path: Path
) -> None:
    version = push_tight(repository, tmp_path, 10)
    with pytest.raises(LoadFailed, match=r"out of memory on cpu: .* while warming up\. .*num_gpus"):
        load_model(version, allow_code=True, options={"most": 0})
