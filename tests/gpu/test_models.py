"""Models on a real GPU: they answer as on the CPU, and keep to their part of the memory."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayprism.core.compare import Tolerance
from rayprism.core.tensors import Datatype, TensorSpec
from rayprism.errors import LoadFailed, OutOfMemory
from rayprism.models.engines import CACHE_VARIABLE
from rayprism.models.gpu import Gpu, GpuFacts, read_gpu
from rayprism.models.loader import LoadedModel, load_model
from rayprism.models.push import push_model
from rayprism.models.repository import ModelVersion, Repository
from rayprism.telemetry.gpu import GpuMeter
from tests.gpu.conftest import MOST_ROWS, wide_rows
from tests.support.cuda import needs_gpu
from tests.support.models import (
    FEATURES,
    example_rows,
    mlp_example,
    mlp_reference,
    save_mlp,
    save_mlp_export,
    save_mlp_script,
)

pytestmark = [pytest.mark.gpu, needs_gpu, pytest.mark.timeout(600)]

X = TensorSpec("x", Datatype.FP32, (-1, FEATURES))
Y = TensorSpec("y", Datatype.FP32, (-1, 3))
LOOSE = Tolerance(absolute=0.1, relative=0.05)


def push_mlp(repository: Repository, folder: Path, form: str, **more: Any) -> ModelVersion:
    """Pushed on the CPU, as on a laptop."""
    save, file = {
        "onnx": (save_mlp, "mlp.onnx"),
        "export": (save_mlp_export, "mlp.pt2"),
        "script": (save_mlp_script, "mlp.pt"),
    }[form]
    source = save(folder / file)
    signature = {} if form == "onnx" else {"inputs": [X], "outputs": [Y]}
    return push_model(
        repository,
        form,
        source,
        example=mlp_example(),
        allow_code=form == "script",
        **signature,
        **more,
    ).version


def load(version: ModelVersion, gpu: Gpu | None = None, **options: Any) -> LoadedModel:
    return load_model(
        version,
        allow_code=True,
        device="cuda",
        gpu=gpu,
        options={version.manifest.runtime: options},
    )


@pytest.mark.parametrize("form", ["onnx", "export", "script"])
def test_answers_are_those_of_the_cpu(repository: Repository, tmp_path: Path, form: str) -> None:
    model = load(push_mlp(repository, tmp_path, form))
    assert model.device == "cuda:0"
    for rows in (1, 2, 7, 64, 200):
        x = example_rows(rows)
        np.testing.assert_allclose(model.run({"x": x})["y"], mlp_reference(x), 1e-4, 1e-5)
    frozen = np.frombuffer(example_rows(4).tobytes(), np.float32).reshape(4, FEATURES)
    np.testing.assert_allclose(model.run({"x": frozen})["y"], mlp_reference(frozen), 1e-4, 1e-5)
    model.close()


@pytest.mark.parametrize("form", ["onnx", "export"])
def test_it_runs_on_another_thread_than_it_was_loaded_on(
    repository: Repository, tmp_path: Path, form: str
) -> None:
    model = load(push_mlp(repository, tmp_path, form))
    found: list[Any] = []
    for _ in range(3):
        thread = threading.Thread(target=lambda: found.append(model.run({"x": example_rows(5)})))
        thread.start()
        thread.join()
    for outputs in found:
        np.testing.assert_allclose(outputs["y"], mlp_reference(example_rows(5)), 1e-4, 1e-5)
    assert len(found) == 3


def test_answers_stay_when_the_next_batch_runs(repository: Repository, tmp_path: Path) -> None:
    """Page-locked memory is used again: not before the answer is let go of."""
    model = load(push_mlp(repository, tmp_path, "export"))
    batches = [example_rows(64) * scale for scale in range(1, 6)]
    answers = [model.run({"x": x})["y"] for x in batches]
    for x, y in zip(batches, answers, strict=True):
        np.testing.assert_allclose(y, mlp_reference(x), 1e-4, 1e-4)


@pytest.mark.parametrize("datatype", ["float16", "bfloat16"])
def test_autocast_is_near_and_keeps_the_datatype(
    repository: Repository, tmp_path: Path, datatype: str
) -> None:
    version = push_mlp(repository, tmp_path, "export", tolerance=LOOSE)
    model = load(version, autocast=datatype)
    x = example_rows(64)
    y = model.run({"x": x})["y"]
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, mlp_reference(x), rtol=0.05, atol=0.1)
    assert not np.allclose(y, mlp_reference(x), rtol=1e-6, atol=1e-7), "something was rounded"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["default", "max-autotune"])
def test_a_compiled_model_is_ready_for_any_batch(
    repository: Repository, tmp_path: Path, mode: str
) -> None:
    model = load(push_mlp(repository, tmp_path, "export"), compile=mode)
    for rows in (1, 3, 17, 64):
        x = example_rows(rows)
        began_s = time.perf_counter()
        y = model.run({"x": x})["y"]
        assert time.perf_counter() - began_s < 1.0, "nothing is compiled under load"
        np.testing.assert_allclose(y, mlp_reference(x), 1e-4, 1e-5)


def test_tensorrt_keeps_its_engine(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt", reason="TensorRT is missing: pip install '.[tensorrt]'")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    version = push_mlp(repository, tmp_path, "onnx", tolerance=LOOSE)
    model = load(version, provider="tensorrt")
    engines = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.engine")}
    assert engines
    for rows in (1, 5, 64):
        x = example_rows(rows)
        np.testing.assert_allclose(model.run({"x": x})["y"], mlp_reference(x), 0.02, 0.02)
    model.close()
    again = load(version, provider="tensorrt")
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.engine")}
    assert after == engines, "it is read, not built again"
    again.close()
    half = load(version, provider="tensorrt", fp16=True)
    np.testing.assert_allclose(
        half.run({"x": example_rows(8)})["y"], mlp_reference(example_rows(8)), 0.05, 0.1
    )


# Memory


def test_a_batch_over_its_part_does_not_fit_and_a_smaller_one_does(
    wide: ModelVersion, part: Gpu
) -> None:
    model = load(wide, part)
    assert model.gpu_limit_bytes is not None
    assert model.measured_rows < MOST_ROWS, "it was found while warming up"
    for _ in range(3):
        with pytest.raises(OutOfMemory, match=r"wide 1: out of memory on cuda:0: "):
            model.run({"x": wide_rows(MOST_ROWS)})
        rows = wide_rows(4)
        np.testing.assert_allclose(model.run({"x": rows})["y"], rows, rtol=1e-4)
    model.close()


def test_a_whole_gpu_has_room_for_it(wide: ModelVersion, facts: GpuFacts) -> None:
    if facts.total_bytes < 16 * 1024**3:
        pytest.skip("a small GPU")
    model = load(wide)
    assert (model.gpu_limit_bytes, model.measured_rows) == (None, MOST_ROWS)
    rows = wide_rows(MOST_ROWS)
    np.testing.assert_allclose(model.run({"x": rows})["y"], rows, rtol=1e-4)
    model.close()


def test_a_part_in_which_no_row_fits_says_so(wide: ModelVersion, facts: GpuFacts) -> None:
    with pytest.raises(LoadFailed, match=r"out of memory on cuda:0|cannot load it"):
        load(wide, Gpu(0, 64 * 1024**2 / facts.total_bytes))


# What is known of the GPU


def test_the_driver_and_torch_mean_the_same_gpu(facts: GpuFacts) -> None:
    import torch

    known = torch.cuda.get_device_properties(0)
    assert facts.name == known.name
    assert facts.total_bytes == known.total_memory
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True)
    assert facts.uuid in listed.stdout


def test_a_gpu_that_is_not_there() -> None:
    with pytest.raises(LoadFailed, match="cuDeviceGet with error 101"):
        read_gpu(64)


def test_nvml_reads_this_gpu(repository: Repository, tmp_path: Path, facts: GpuFacts) -> None:
    pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    model = load(push_mlp(repository, tmp_path, "export"))
    meter = GpuMeter.open(facts.uuid)
    assert meter is not None
    meter.read()
    used, utilization = meter.reading
    # In a container, NVML may know this process by another id.
    assert used is None or 0 < used < facts.total_bytes
    assert utilization is None or 0 <= utilization <= 1
    model.close()


def test_two_processes_share_it(repository: Repository, tmp_path: Path) -> None:
    """Each with half of it, both at once."""
    version = push_mlp(repository, tmp_path, "onnx")
    code = (
        "import sys\n"
        "from rayprism.models.gpu import Gpu\n"
        "from rayprism.models.loader import load_model\n"
        "from rayprism.models.repository import Repository\n"
        "from tests.support.models import example_rows\n"
        "version = Repository(sys.argv[1]).version('onnx', 1)\n"
        "model = load_model(version, device='cuda', gpu=Gpu(0, 0.5))\n"
        "print(model.device, flush=True)\n"
        "sys.stdin.readline()\n"
        "model.run({'x': example_rows(64)})\n"
        "print('ran')\n"
    )
    command = [sys.executable, "-c", code, str(repository.root)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(2)]
    assert version.manifest.model == "onnx"
    try:
        assert [process.stdout.readline().strip() for process in processes] == ["cuda:0"] * 2  # type: ignore[union-attr]
        assert [process.communicate("go\n")[0].strip() for process in processes] == ["ran"] * 2
    finally:
        for process in processes:
            process.kill()
