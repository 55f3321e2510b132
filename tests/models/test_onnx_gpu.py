"""ONNX Runtime on a GPU, as far as it can be seen without one.

What the providers are told is looked at in the arguments; binding is done for real, on the CPU.
That a GPU answers the same is in tests/gpu.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from rayprism.errors import LoadFailed
from rayprism.models import onnx as onnx_module
from rayprism.models import onnx_gpu
from rayprism.models.gpu import Gpu, GpuFacts
from rayprism.models.onnx import OnnxRuntime
from rayprism.models.onnx_gpu import CUDA, TENSORRT, BoundRun, gpu_providers
from rayprism.models.runtime import RuntimeSettings
from tests.support.models import FEATURES, example_rows, mlp_reference, save_mlp, save_onnx

PLAIN = {"provider": "cuda", "cudnn_conv_algo_search": "heuristic", "fp16": False, "tf32": False}
GIB = 1024**3


@pytest.fixture(autouse=True)
def eighty_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the driver would say."""
    facts = GpuFacts("NVIDIA H100 80GB HBM3", "GPU-1", 80 * GIB)
    monkeypatch.setattr(onnx_gpu, "read_gpu", lambda index: facts)


def providers(settings: RuntimeSettings, **options: Any) -> Any:
    return gpu_providers("m.onnx", settings, {**PLAIN, **options})


def test_a_whole_gpu_is_not_bounded_and_computes_as_the_cpu_does() -> None:
    assert providers(RuntimeSettings(gpu=Gpu(1))) == [
        (CUDA, {"device_id": "1", "cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "0"})
    ]


def test_a_part_of_a_gpu_is_bounded() -> None:
    ((_, told),) = providers(RuntimeSettings(gpu=Gpu(0, 0.25)))
    assert int(told["gpu_mem_limit"]) == 20 * GIB - GIB // 2
    assert told["arena_extend_strategy"] == "kSameAsRequested"


def test_options_reach_cuda() -> None:
    settings = RuntimeSettings()
    ((_, told),) = providers(settings, cudnn_conv_algo_search="exhaustive", tf32=True)
    assert (told["cudnn_conv_algo_search"], told["use_tf32"]) == ("EXHAUSTIVE", "1")


def test_half_precision_is_tensorrt_s() -> None:
    with pytest.raises(LoadFailed, match=r"m\.onnx: options\.onnx\.fp16 needs provider: tensorrt"):
        providers(RuntimeSettings(), fp16=True)


def test_tensorrt_comes_first_with_its_cache_and_cuda_for_the_rest(tmp_path: Path) -> None:
    settings = RuntimeSettings(gpu=Gpu(0, 0.5), engines=tmp_path)
    (first, tensorrt), (second, cuda) = providers(settings, provider="tensorrt", fp16=True)
    assert (first, second) == (TENSORRT, CUDA)
    assert tensorrt == {
        "device_id": "0",
        "trt_fp16_enable": "1",
        "trt_max_workspace_size": str(40 * GIB - GIB // 2),
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(tmp_path),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(tmp_path),
    }
    assert "gpu_mem_limit" in cuda


# Binding


def bound(path: Path, *outputs: str) -> BoundRun:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return BoundRun(session, outputs, "cpu")


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_bound_tensors_give_the_model_s_answers(mlp_onnx: Path, rows: int) -> None:
    run = bound(mlp_onnx, "y")
    for seed in (1, 2):
        x = example_rows(rows) * seed
        outputs = run({"x": x})
        assert outputs.keys() == {"y"}
        np.testing.assert_allclose(outputs["y"], mlp_reference(x), rtol=1e-5, atol=1e-6)


def test_answers_stay_when_the_next_batch_runs(mlp_onnx: Path) -> None:
    run, x = bound(mlp_onnx, "y"), example_rows(2)
    first = run({"x": x})["y"]
    run({"x": -x})
    np.testing.assert_allclose(first, mlp_reference(x), rtol=1e-5, atol=1e-6)


def test_read_only_and_strided_inputs_are_bound(mlp_onnx: Path) -> None:
    run = bound(mlp_onnx, "y")
    frozen = np.frombuffer(example_rows(4).tobytes(), np.float32).reshape(4, FEATURES)
    strided = np.repeat(example_rows(4), 2, axis=0)[::2]
    for x in (frozen, strided):
        np.testing.assert_allclose(run({"x": x})["y"], mlp_reference(x), rtol=1e-5, atol=1e-6)


def test_several_outputs_keep_their_names_and_scalars_their_shape(tmp_path: Path) -> None:
    path = save_onnx(
        tmp_path / "m.onnx",
        [helper.make_node("Neg", ["s"], ["a"]), helper.make_node("Abs", ["s"], ["b"])],
        [helper.make_tensor_value_info("s", TensorProto.FLOAT, [])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, []) for name in "ab"],
    )
    outputs = bound(path, "b", "a")({"s": np.array(-3, np.float32)})
    assert {name: (value.shape, float(value)) for name, value in outputs.items()} == {
        "b": ((), 3.0),
        "a": ((), 3.0),
    }


# Opening. The stand-in is the session: it says that it has what it was asked for.


class GpuSession:
    """Stand-in for a session on a GPU: keeps what it is told, and runs on the CPU."""

    made: SimpleNamespace

    def __init__(self, path: str, options: Any, *, providers: Any, enable_fallback: int) -> None:
        names = [item if isinstance(item, str) else item[0] for item in providers]
        self._names = [name for name in names if name not in self.made.dropped]
        self.made.providers, self.made.enable_fallback = providers, enable_fallback
        real = self.made.real(path, options, providers=["CPUExecutionProvider"])
        self.get_inputs, self.get_outputs = real.get_inputs, real.get_outputs
        self.io_binding, self.run_with_iobinding = real.io_binding, real.run_with_iobinding
        self.run = real.run

    def get_providers(self) -> list[str]:
        return self._names

    def disable_fallback(self) -> None:
        self.made.falls_back = False


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """An onnxruntime that was built for GPUs, and what its last session was told."""
    made = SimpleNamespace(real=onnxruntime.InferenceSession, dropped=(), falls_back=True)
    monkeypatch.setattr(GpuSession, "made", made, raising=False)
    listed = [TENSORRT, CUDA, "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: listed)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    monkeypatch.setattr(onnxruntime, "InferenceSession", GpuSession)

    def bind(session: Any, outputs: Any, device: str) -> BoundRun:
        made.bound_to = device
        return BoundRun(session, outputs, "cpu")

    monkeypatch.setattr(onnx_module, "BoundRun", bind)
    return made


def open_on_gpu(path: Path, gpu: Gpu | None = None, **options: Any) -> OnnxRuntime:
    settings = RuntimeSettings(device="cuda", gpu=gpu or Gpu(), options={"onnx": options})
    return OnnxRuntime.open(path.parent, path.name, settings)


def test_a_model_on_a_gpu_is_bound_to_it(mlp_onnx: Path, made: SimpleNamespace) -> None:
    runtime = open_on_gpu(mlp_onnx, Gpu(1))
    assert (runtime.device, made.bound_to) == ("cuda:1", "cuda:1")
    assert [name for name, _ in made.providers[:-1]] == [CUDA]
    assert made.providers[-1] == "CPUExecutionProvider", "for what has no kernel on the GPU"
    np.testing.assert_allclose(
        runtime.run({"x": example_rows(2)})["y"], mlp_reference(example_rows(2)), rtol=1e-5
    )


def test_nothing_goes_over_to_the_cpu_by_itself(mlp_onnx: Path, made: SimpleNamespace) -> None:
    """ONNX Runtime would print a line and go on there: when it starts, and at any failed run."""
    open_on_gpu(mlp_onnx)
    assert (made.enable_fallback, made.falls_back) == (0, False)


@pytest.mark.parametrize(
    ("options", "dropped", "said"),
    [
        ({}, (CUDA,), r"asked for with CUDAExecutionProvider, and onnxruntime runs .* CPUExecu"),
        (
            {"provider": "tensorrt"},
            (TENSORRT,),
            r"with TensorrtExecutionProvider, and .* with CUDAExecution.*TensorRT 10 where",
        ),
    ],
)
def test_a_provider_that_does_not_start_is_no_gpu(
    mlp_onnx: Path,
    made: SimpleNamespace,
    options: dict[str, Any],
    dropped: tuple[str, ...],
    said: str,
) -> None:
    made.dropped = dropped
    with pytest.raises(LoadFailed, match=said):
        open_on_gpu(mlp_onnx, **options)


def test_a_provider_that_was_not_built_in_is_named(
    mlp_onnx: Path, made: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA])
    open_on_gpu(mlp_onnx)
    with pytest.raises(LoadFailed, match=r"was built without Tensorrt\. Mend: .*rayprism\[gpu\]"):
        open_on_gpu(mlp_onnx, provider="tensorrt")


def test_what_a_provider_raises_is_told_with_what_to_check(
    mlp_onnx: Path, made: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("Please install TensorRT libraries")

    monkeypatch.setattr(onnxruntime, "InferenceSession", fail)
    with pytest.raises(LoadFailed, match=r"install TensorRT libraries\. Mend: check that CUDA 13"):
        open_on_gpu(mlp_onnx, provider="tensorrt")


def test_strings_are_not_bound(tmp_path: Path, made: SimpleNamespace) -> None:
    path = save_onnx(
        tmp_path / "m.onnx",
        [helper.make_node("Identity", ["x"], ["y"])],
        [helper.make_tensor_value_info("x", TensorProto.STRING, ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.STRING, ["n"])],
    )
    runtime = open_on_gpu(path)
    assert runtime.run({"x": np.array([b"a", b"b"], object)})["y"].tolist() == [b"a", b"b"]
    assert not hasattr(made, "bound_to")


def test_options_of_gpus_mean_nothing_on_the_cpu(mlp_onnx: Path) -> None:
    options = {"onnx": {"provider": "tensorrt", "fp16": True, "tf32": True}}
    settings = RuntimeSettings(device="cpu", options=options)
    assert OnnxRuntime.open(mlp_onnx.parent, mlp_onnx.name, settings).device == "cpu"


def test_a_closed_model_lets_go_of_its_session(tmp_path: Path, made: SimpleNamespace) -> None:
    runtime = open_on_gpu(save_mlp(tmp_path / "m.onnx"))
    runtime.close()
    assert runtime._bound is runtime._session is None
