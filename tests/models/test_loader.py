"""What a loaded model checks, measures and leaves alone."""

from __future__ import annotations

import fcntl
import json
import logging
import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayprism.core.tensors import Datatype, Tensors, TensorSpec
from rayprism.errors import GoldenMismatch, LoadFailed, ModelFailed
from rayprism.models import loader, warm_up
from rayprism.models.engines import CACHE_VARIABLE, engine_folder
from rayprism.models.gpu import Gpu, GpuFacts
from rayprism.models.loader import LoadedModel, load_model
from rayprism.models.manifest import Batching
from rayprism.models.push import push_model
from rayprism.models.repository import ModelVersion, Repository
from rayprism.models.runtime import Signature, merge_options
from tests.support.models import example_rows, mlp_example, save_mlp


class Recorder:
    """A runtime that notes what it was asked, and answers as the MLP's manifest says."""

    device = "cpu"

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.closed = False

    def signature(self) -> Signature:
        return Signature()

    def run(self, inputs: Tensors) -> Tensors:
        rows = len(inputs["x"])
        self.rows.append(rows)
        return {"y": np.zeros((rows, 3), np.float32)}

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def version(repository: Repository, mlp_onnx: Path) -> ModelVersion:
    return push_model(repository, "m", mlp_onnx, example=mlp_example()).version


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(loader, "open_runtime", lambda *_, **__: recorder)
    return recorder


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, recorder: Recorder) -> dict[str, float]:
    """Runs take what is written here, whatever the machine is doing."""
    taken = {"first_s": 0.0, "row_s": 0.0}

    def one_run(model: LoadedModel, batch: Tensors) -> float:
        model.run(batch)
        first_s = taken["first_s"] if len(recorder.rows) == 1 else 0.0
        return first_s + taken["row_s"] * recorder.rows[-1]

    monkeypatch.setattr(warm_up, "_one_run", one_run)
    return taken


@pytest.mark.parametrize(
    ("first_s", "row_s", "runs", "measured_s"),
    [
        # A fast model: 1 row and the largest batch, each twice.
        (0.0, 0.00001, [1, 1, 64, 64], 0.00064),
        # The first run pays for what is set up once; it is not taken for the model's speed.
        (0.4, 0.00001, [1, 1, 64, 64], 0.00064),
        # Slower: the largest batch that is done in 50 ms.
        (0.0, 0.002, [1, 1, 25, 25], 0.05),
        # So slow that 1 row is enough, and then that once is.
        (0.0, 0.04, [1, 1], 0.04),
        (0.0, 3.0, [1], 3.0),
    ],
)
def test_what_is_warmed_up(
    version: ModelVersion,
    recorder: Recorder,
    clock: dict[str, float],
    first_s: float,
    row_s: float,
    runs: list[int],
    measured_s: float,
) -> None:
    clock.update(first_s=first_s, row_s=row_s)
    loaded = load_model(version, check=False)
    assert recorder.rows == runs
    assert loaded.measured_rows == runs[-1]
    assert loaded.measured_run_s == pytest.approx(measured_s)
    assert bool(loaded.notes) is (runs[-1] < 64)
    if loaded.notes:
        assert f"warmed up with {runs[-1]} of at most 64 rows" in loaded.notes[0]
    assert not recorder.closed
    loaded.close()
    assert recorder.closed


@pytest.mark.parametrize(
    ("first_s", "row_s", "runs"),
    [
        # The largest batch, and then what lies between: for each there may be a kernel to load.
        (0.0, 0.00001, [1, 1, 64, 64, 2, 4, 8, 16, 32]),
        # The first run compiles, and says nothing of how slow the model is.
        (20.0, 0.00001, [1, 1, 64, 64, 2, 4, 8, 16, 32]),
        (0.0, 0.9, [1, 1, 64, 64, 2, 4, 8, 16, 32]),
        # One row takes seconds: 64 might take minutes.
        (0.0, 2.0, [1, 1]),
    ],
)
def test_what_is_warmed_up_on_a_gpu(
    version: ModelVersion,
    recorder: Recorder,
    clock: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
    first_s: float,
    row_s: float,
    runs: list[int],
) -> None:
    monkeypatch.setattr(recorder, "device", "cuda:0")
    clock.update(first_s=first_s, row_s=row_s)
    loaded = load_model(version, check=False)
    assert recorder.rows == runs
    assert loaded.measured_rows == max(runs)
    assert bool(loaded.notes) is (max(runs) < 64)


def test_a_gpu_is_warm_for_the_batches_that_fit(
    version: ModelVersion, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = recorder.run

    def run(inputs: Tensors) -> Tensors:
        outputs = real(inputs)
        if len(inputs["x"]) > 20:
            raise MemoryError("CUDA out of memory")
        return outputs

    monkeypatch.setattr(recorder, "device", "cuda:0")
    monkeypatch.setattr(recorder, "run", run)
    loaded = load_model(version, check=False)
    assert recorder.rows == [1, 1, 64, 32, 16, 16, 2, 4, 8]
    assert loaded.measured_rows == 16
    assert "warmed up with 16 of at most 64 rows" in loaded.notes[0]


def test_the_collector_is_left_as_it_was(version: ModelVersion) -> None:
    import gc

    assert gc.isenabled()
    load_model(version)
    assert gc.isenabled()
    with pytest.raises(LoadFailed):
        load_model(changed(version, _other_datatype))
    assert gc.isenabled()
    gc.disable()
    try:
        load_model(version)
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_golden_example_that_fails_closes_the_model(
    version: ModelVersion, recorder: Recorder
) -> None:
    with pytest.raises(GoldenMismatch, match="m 1 on cpu does not reproduce"):
        load_model(version)
    assert recorder.closed


def test_a_model_that_raises_while_warming_up(
    version: ModelVersion, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(inputs: Tensors) -> Tensors:
        raise ValueError("too large")

    monkeypatch.setattr(recorder, "run", fail)
    with pytest.raises(LoadFailed, match=r"warming up with x \[1, 4\] raised ValueError"):
        load_model(version)
    assert recorder.closed


def test_threads_and_device_reach_the_runtime(
    version: ModelVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    real = loader.open_runtime

    def spy(kind: Any, folder: Path, file: str, settings: Any, **keywords: Any) -> Any:
        seen.append(settings)
        return real(kind, folder, file, settings, **keywords)

    monkeypatch.setattr(loader, "open_runtime", spy)
    operator = {"onnx": {"graph_optimization": "basic"}, "mine": 1}
    load_model(version, threads=3, device="cpu", gpu=Gpu(1, 0.5), options=operator)
    (settings,) = seen
    assert (settings.threads, settings.device, settings.allow_code) == (3, "cpu", False)
    assert (settings.gpu, settings.engines) == (Gpu(1, 0.5), None)
    assert settings.options == operator


def test_the_operator_s_options_are_laid_over_the_manifest_s_one_by_one() -> None:
    manifest = {"onnx": {"provider": "cuda", "tf32": True}, "most": 3}
    operator = {"onnx": {"provider": "tensorrt"}, "most": 4, "torch": {"tf32": True}}
    assert merge_options(manifest, operator) == {
        "onnx": {"provider": "tensorrt", "tf32": True},
        "most": 4,
        "torch": {"tf32": True},
    }
    assert merge_options(manifest, {}) == manifest
    assert manifest["onnx"] == {"provider": "cuda", "tf32": True}, "and is left as it was"


# TensorRT's engines


FACTS = GpuFacts("NVIDIA H100 80GB HBM3", "GPU-1", 80 * 1024**3)


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine whose driver knows a GPU; gives the folder of its cache."""
    monkeypatch.setattr(loader, "read_gpu", lambda index: FACTS)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_engines_are_kept_for_each_version_and_gpu_and_built_by_one_at_a_time(
    version: ModelVersion, with_gpu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    building: list[str] = []

    def spy(kind: Any, folder: Path, file: str, settings: Any, **keywords: Any) -> Any:
        seen.append(settings)
        with (settings.engines / "lock").open("w") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        building.append(threading.current_thread().name)
        return Recorder()

    monkeypatch.setattr(loader, "open_runtime", spy)
    options = {"onnx": {"provider": "tensorrt"}}
    for name in ("one", "two"):
        load = partial(load_model, version, device="cuda", options=options, check=False)
        thread = threading.Thread(target=load, name=name)
        thread.start()
        thread.join()
    assert building == ["one", "two"]
    digest = version.manifest.digest.removeprefix("sha256:")[:16]
    folder = with_gpu / "engines" / f"m-1-{digest}" / "NVIDIA-H100-80GB-HBM3"
    assert {settings.engines for settings in seen} == {folder}
    assert [path.stat().st_mode & 0o777 for path in (folder, *folder.parents[:2])] == [0o700] * 3
    version.verify()


@pytest.mark.parametrize("options", [{}, {"onnx": {"provider": "cuda"}}])
def test_without_tensorrt_there_is_no_cache(
    version: ModelVersion, with_gpu: Path, recorder: Recorder, options: dict[str, Any]
) -> None:
    load_model(version, device="cuda", options=options, check=False)
    assert not with_gpu.exists()


def test_engines_that_others_could_change_are_not_read(
    version: ModelVersion, with_gpu: Path
) -> None:
    folder = engine_folder(version.manifest, FACTS)
    folder.parent.chmod(0o770)
    with pytest.raises(LoadFailed, match=r"others can write there.*chmod go-w"):
        engine_folder(version.manifest, FACTS)


def test_a_cache_that_cannot_be_made_is_named(version: ModelVersion, with_gpu: Path) -> None:
    with_gpu.write_text("a file")
    with pytest.raises(LoadFailed, match=rf"cannot be made .*Set {CACHE_VARIABLE}"):
        engine_folder(version.manifest, FACTS)


def test_a_loaded_model_knows_its_gpu_and_its_part(
    version: ModelVersion, with_gpu: Path, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_model(version, check=False).gpu is None
    monkeypatch.setattr(recorder, "device", "cuda:0")
    loaded = load_model(version, device="cuda", gpu=Gpu(0, 0.5), check=False)
    assert loaded.gpu == FACTS
    assert loaded.gpu_limit_bytes == 40 * 1024**3 - 512 * 1024**2


@pytest.mark.parametrize(
    ("outputs", "said"),
    [
        ({}, "m 1: output 'y' is missing"),
        ({"y": np.zeros((2, 3))}, "output 'y' is FP64, the manifest says FP32"),
        ({"y": np.zeros((3, 3), np.float32)}, r"shape \[3, 3\], the batch has 2 rows"),
        ({"y": np.zeros((), np.float32)}, r"shape \[\], the batch has 2 rows"),
        ({"z": np.zeros((2, 3), np.float32)}, "output 'y' is missing"),
    ],
)
def test_answers_are_checked(
    version: ModelVersion,
    recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch,
    outputs: Tensors,
    said: str,
) -> None:
    loaded = load_model(version, check=False)
    monkeypatch.setattr(recorder, "run", lambda inputs: outputs)
    with pytest.raises(ModelFailed, match=said):
        loaded.run({"x": example_rows(2)})


def changed(version: ModelVersion, change: Any) -> ModelVersion:
    raw = json.loads(version.manifest.to_json())
    change(raw)
    return ModelVersion(version.folder, type(version.manifest).model_validate(raw))


def _two_inputs(raw: Any) -> None:
    raw["inputs"].append({"name": "w", "datatype": "FP32", "shape": [-1, 1]})
    raw["golden"]["inputs"].append(
        {"name": "w", "datatype": "FP32", "shape": [3, 1], "data": [1, 2, 3]}
    )


def _other_output(raw: Any) -> None:
    raw["outputs"][0]["name"] = raw["golden"]["outputs"][0]["name"] = "z"


def _other_datatype(raw: Any) -> None:
    raw["outputs"][0]["datatype"] = raw["golden"]["outputs"][0]["datatype"] = "FP64"


def _other_input(raw: Any) -> None:
    raw["inputs"][0]["datatype"] = raw["golden"]["inputs"][0]["datatype"] = "INT32"
    raw["golden"]["inputs"][0]["data"] = [0] * 12


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_two_inputs, "the model has no input 'w'"),
        (_other_output, "it has no output 'z'"),
        (_other_datatype, "is not what the manifest says: output 'y' is FP32, the manifest says"),
        (_other_input, "is not what the manifest says: input 'x' is FP32, the manifest says INT32"),
        (lambda raw: raw["outputs"][0].update(shape=[-1, 7]),
         r"output 'y' has shape \[-1, 3\], the manifest says \[-1, 7\]"),
        (lambda raw: raw["outputs"][0].update(shape=[-1, 3, 1]), "output 'y' has shape"),
    ],
)  # fmt: skip
def test_the_model_has_to_be_what_the_manifest_says(
    version: ModelVersion, change: Any, said: str
) -> None:
    with pytest.raises(LoadFailed, match=said):
        load_model(changed(version, change))


def test_a_fixed_size_may_be_left_free_by_neither(version: ModelVersion) -> None:
    loose = changed(version, lambda raw: raw["outputs"][0].update(shape=[-1, -1]))
    load_model(loose)


def test_the_fast_path_copies_nothing(version: ModelVersion, recorder: Recorder) -> None:
    """Serving pays for every step between the batch and the engine, each time."""
    loaded = load_model(version, check=False)
    given: list[Tensors] = []
    answer = {"y": np.zeros((2, 3), np.float32)}
    recorder.run = lambda inputs: given.append(inputs) or answer  # type: ignore[func-returns-value, method-assign]
    batch = {"x": example_rows(2)}
    assert loaded.prepare(batch) is batch
    assert loaded.run(batch) is answer
    assert given[0] is batch
    assert len(given) == 1


def test_a_model_that_is_not_batched(repository: Repository, tmp_path: Path) -> None:
    path = save_mlp(tmp_path / "m.onnx", batch=2)
    loaded = load_model(push_model(repository, "m", path, example=mlp_example(2)).version)
    assert loaded.run({"x": example_rows(2)})["y"].shape == (2, 3)
    assert isinstance(loaded, LoadedModel)
    assert loaded.manifest.batching == Batching(batched=False, max_rows=1)


def test_nothing_is_logged_where_nothing_is_wrong(
    version: ModelVersion, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.WARNING):
        load_model(version).run({"x": example_rows(2)})
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")


def test_the_engines_are_imported_only_when_needed() -> None:
    import subprocess
    import sys

    script = (
        "import sys\n"
        "import rayprism.models.loader, rayprism.models.push, rayprism.models.onnx\n"
        "import rayprism.models.torch, rayprism.models.torch_archive, rayprism.models.onnx_file\n"
        "found = {'onnxruntime', 'torch', 'ray', 'onnx', 'pandas'} & set(sys.modules)\n"
        "assert not found, found\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_specs_are_compared_by_name(repository: Repository, tmp_path: Path) -> None:
    """The order in the manifest is the owner's, not the graph's."""
    from onnx import TensorProto, helper

    from tests.support.models import save_onnx

    path = save_onnx(
        tmp_path / "m.onnx",
        [helper.make_node("Sub", ["a", "b"], ["y"]), helper.make_node("Neg", ["a"], ["z"])],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 1]) for n in "ab"],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 1]) for n in "yz"],
    )
    specs = [TensorSpec(name, Datatype.FP32, (-1, 1)) for name in "bazy"]
    example = {"a": [[5.0], [1.0]], "b": [[2.0], [1.0]]}
    version = push_model(
        repository, "m", path, example=example, inputs=specs[:2], outputs=specs[2:]
    ).version
    assert version.manifest.output_names == ["z", "y"]
    outputs = load_model(version).run(
        {"b": np.array([[1]], np.float32), "a": np.array([[3]], np.float32)}
    )
    assert {name: array.item() for name, array in outputs.items()} == {"z": -3.0, "y": 2.0}
