"""torch on a GPU, as far as it can be seen without one: the same code with the CPU for a device.

Page-locked memory, streams and the memory fraction are torch.cuda's alone; tests/gpu has them.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from rayprism.core.tensors import Datatype, TensorSpec, numpy_dtype
from rayprism.errors import LoadFailed
from rayprism.models import torch as torch_module
from rayprism.models import torch_gpu
from rayprism.models.gpu import Gpu, GpuFacts
from rayprism.models.runtime import RuntimeSettings
from rayprism.models.torch import TorchRuntime
from rayprism.models.torch_gpu import TorchGpu
from tests.support.models import (
    FEATURES,
    example_rows,
    mlp_reference,
    save_mlp_export,
    save_mlp_script,
)

torch = pytest.importorskip("torch")

PLAIN = {"autocast": False, "compile": False, "tf32": False}
NUMBERS = [d for d in Datatype if d is not Datatype.BYTES]
GIB = 1024**3


@pytest.fixture(autouse=True)
def precision() -> Any:
    """What a model sets for the whole process is set back."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def gpu(**options: Any) -> TorchGpu:
    return TorchGpu(torch, "cpu", Gpu(), {**PLAIN, **options})


@pytest.mark.parametrize("datatype", NUMBERS)
def test_every_datatype_goes_there_and_back(datatype: Datatype) -> None:
    there = gpu()
    x = np.array([[0, 1], [1, 1], [1, 0]]).astype(numpy_dtype(datatype))
    tensor = there.put(x)
    assert str(tensor.dtype).removeprefix("torch.") == numpy_dtype(datatype).name
    back = there.fetch({"y": tensor})["y"]
    assert back.dtype == x.dtype
    assert back.tolist() == x.tolist()


def test_inputs_are_copied_whatever_their_memory_is_like() -> None:
    there = gpu()
    frozen = np.frombuffer(example_rows(4).tobytes(), np.float32).reshape(4, FEATURES)
    strided = np.repeat(example_rows(4), 2, axis=0)[::2]
    halves = np.asfortranarray(example_rows(4).astype(ml_dtypes.bfloat16))
    for x in (frozen, strided, halves, np.array(3.5, np.float32), np.zeros((0, 4), np.float32)):
        tensor = there.put(x)
        assert tuple(tensor.shape) == x.shape
        np.testing.assert_array_equal(there.fetch({"y": tensor})["y"], x)
    x = example_rows(2)
    tensor = there.put(x)
    x[:] = 0
    assert (tensor != 0).all(), "the client's memory may be used again at once"


def test_outputs_of_any_layout_come_back() -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    back = gpu().fetch({"a": tensor.T, "b": tensor[:, 1]})
    assert back["a"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert back["b"].tolist() == [1, 4]


def test_autocast_computes_in_less_and_answers_in_the_manifest_s_datatypes() -> None:
    there = gpu(autocast="bfloat16")
    there.expect(
        [TensorSpec("y", Datatype.FP32, (-1, 3)), TensorSpec("top", Datatype.INT64, (-1,))]
    )
    weights = torch.randn(4, 3)
    x = example_rows(5)
    with torch.inference_mode(), there.running():
        product = there.put(x) @ weights
        assert product.dtype is torch.bfloat16
        outputs = there.fetch({"y": product, "top": product.argmax(-1), "more": product})
    assert outputs["y"].dtype == np.float32
    assert outputs["top"].dtype == np.int64
    assert outputs["more"].dtype == ml_dtypes.bfloat16, "of which nothing is said"
    np.testing.assert_allclose(outputs["y"], x @ weights.numpy(), rtol=0.05, atol=0.05)


def test_rounded_products_are_asked_for() -> None:
    for tf32 in (True, False):
        gpu(tf32=tf32)
        assert torch.backends.cuda.matmul.allow_tf32 is tf32
        assert torch.backends.cudnn.allow_tf32 is tf32


@pytest.mark.parametrize(
    ("option", "mode"), [("default", "default"), ("max-autotune", "max-autotune-no-cudagraphs")]
)
def test_compilation_is_for_any_size_and_any_thread(
    option: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(torch, "compile", lambda module, **how: asked.update(how) or module)
    assert gpu().compile(len) is len
    assert asked == {}
    assert gpu(compile=option).compile(len) is len
    assert asked == {"dynamic": True, "mode": mode}


def test_a_part_of_a_gpu_bounds_the_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    set_to: list[Any] = []
    monkeypatch.setattr(
        torch.cuda,
        "set_per_process_memory_fraction",
        lambda share, device: set_to.append((share, str(device))),
    )
    monkeypatch.setattr(torch_gpu, "read_gpu", lambda index: GpuFacts("H100", "GPU-1", 80 * GIB))
    TorchGpu(torch, "cuda:0", Gpu(), PLAIN)
    assert set_to == []
    TorchGpu(torch, "cuda:1", Gpu(1, 0.25), PLAIN)
    assert set_to == [(pytest.approx(19.5 / 80), "cuda:1")]


# Opening. The stand-in is the device: asked for CUDA, the model gets the CPU in its place.


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archives")
    save_mlp_export(folder / "mlp.pt2")
    save_mlp_script(folder / "mlp.pt")
    return folder


@pytest.fixture
def with_cuda(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    seen = SimpleNamespace(gpu=None)
    monkeypatch.setattr(torch_module, "_device", lambda torch, name, settings: "stand-in")

    def make(torch: Any, device: str, gpu: Gpu, options: Any) -> TorchGpu:
        assert device == "stand-in"
        seen.gpu = gpu
        return TorchGpu(torch, "cpu", gpu, options)

    monkeypatch.setattr(torch_module, "TorchGpu", make)
    from torch.export import passes

    monkeypatch.setattr(passes, "move_to_device_pass", lambda program, device: program)
    real = torch.jit.load
    monkeypatch.setattr(torch.jit, "load", lambda path, map_location: real(path, "cpu"))
    return seen


def open_there(path: Path, **options: Any) -> TorchRuntime:
    settings = RuntimeSettings(
        device="cuda", gpu=Gpu(0, 0.5), allow_code=True, options={"torch": options}
    )
    spec = TensorSpec("x", Datatype.FP32, (-1, FEATURES))
    out = TensorSpec("y", Datatype.FP32, (-1, 3))
    return TorchRuntime.open(path.parent, path.name, settings, inputs=(spec,), outputs=(out,))


@pytest.mark.parametrize("file", ["mlp.pt2", "mlp.pt"])
@pytest.mark.parametrize("autocast", [False, "bfloat16"])
def test_a_model_runs_there(
    archives: Path, with_cuda: SimpleNamespace, file: str, autocast: Any
) -> None:
    runtime = open_there(archives / file, autocast=autocast)
    assert runtime.device == "stand-in"
    assert with_cuda.gpu == Gpu(0, 0.5)
    near = 0.1 if autocast else 1e-5
    for rows in (1, 7):
        y = runtime.run({"x": example_rows(rows)})["y"]
        assert y.dtype == np.float32
        np.testing.assert_allclose(y, mlp_reference(example_rows(rows)), rtol=near, atol=near)
        exact = np.allclose(y, mlp_reference(example_rows(rows)), rtol=1e-5, atol=1e-5)
        assert exact is not bool(autocast)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_takes_batches_of_any_size(
    archives: Path, with_cuda: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With torch's own tracing, and without its code generator, which takes a compiler."""
    real = torch.compile

    def traced(module: Any, *, dynamic: bool, mode: str) -> Any:
        return real(module, dynamic=dynamic, backend="eager")

    monkeypatch.setattr(torch, "compile", traced)
    runtime = open_there(archives / "mlp.pt2", compile="default")
    torch._dynamo.reset()
    for rows in (1, 64):
        runtime.run({"x": example_rows(rows)})
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for rows in (1, 2, 3, 17, 64, 100):
        np.testing.assert_allclose(
            runtime.run({"x": example_rows(rows)})["y"],
            mlp_reference(example_rows(rows)),
            rtol=1e-4,
            atol=1e-5,
        )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled, "none under load"


def test_a_script_cannot_be_compiled(archives: Path, with_cuda: SimpleNamespace) -> None:
    with pytest.raises(LoadFailed, match=r"options\.torch\.compile needs a torch\.export archive"):
        open_there(archives / "mlp.pt", compile="default")


def test_options_of_gpus_mean_nothing_on_the_cpu(archives: Path) -> None:
    options = {"torch": {"autocast": "float16", "compile": "max-autotune", "tf32": True}}
    runtime = TorchRuntime.open(archives, "mlp.pt2", RuntimeSettings(device="cpu", options=options))
    x = example_rows(3)
    np.testing.assert_allclose(
        runtime.run({"x": x})["output"], mlp_reference(x), rtol=1e-5, atol=1e-6
    )
