"""From a version in the repository to a model that is proven to run on this machine.

In this order: the files are the ones that were pushed; code may run; the runtime opens; what the
model declares is what the manifest says; the shapes that will come are warm; the golden example
is reproduced. A replica that gets through is ready; one that does not says what to mend.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any

from rayprism.core.compare import compare_outputs
from rayprism.core.tensors import (
    Array,
    Tensors,
    TensorSpec,
    count_rows,
    datatype_of,
    numpy_dtype,
)
from rayprism.errors import (
    CodeNotAllowed,
    GoldenMismatch,
    LoadFailed,
    ModelFailed,
    OutOfMemory,
    RayprismError,
)
from rayprism.models.batches import (
    checked_prepared,
    fixed_rows,
    plain_outputs,
    run_fixed,
)
from rayprism.models.engines import building, engine_folder
from rayprism.models.gpu import Device, Gpu, GpuFacts, memory_limit, read_gpu
from rayprism.models.manifest import Manifest
from rayprism.models.memory import free_cached_memory, out_of_memory
from rayprism.models.python import Processor
from rayprism.models.repository import ModelVersion
from rayprism.models.runtime import (
    Runtime,
    RuntimeSettings,
    Signature,
    merge_options,
    open_runtime,
)
from rayprism.models.warm_up import warm_up

__all__ = [
    "LoadedModel",
    "Preprocessing",
    "check_code_allowed",
    "load_model",
    "load_preprocessing",
]


class Preprocessing:
    """The pre-processing of a version, which needs no runtime. Made by `load_preprocessing`.

    Attributes:
        version: Where it came from.
        manifest: What it is.
        has_prepare: Whether `prepare` does anything.
    """

    def __init__(self, version: ModelVersion, processor: Processor | None) -> None:
        self.version = version
        self.manifest: Manifest = version.manifest
        self._preprocess = processor.preprocess if processor else None
        self.has_prepare = self._preprocess is not None
        self._batched = self.manifest.batching.batched
        self._name = f"{self.manifest.model} {self.manifest.version}"

    def prepare(self, inputs: Tensors) -> Tensors:
        """Makes the runtime's inputs out of one request's, which were checked before.

        Raises:
            InvalidInput: The pre-processing refused the request.
            ModelFailed: The pre-processing returned what the manifest forbids.
        """
        if self._preprocess is None:
            return inputs
        return checked_prepared(
            self._name,
            self._preprocess(inputs),
            self.manifest.inner_inputs,
            self.manifest.batching.ragged,
            count_rows(inputs) if self._batched else None,
        )

    def run(self, batch: Tensors) -> Tensors:
        """There is no model here.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("pre-processing alone runs no model")

    def close(self) -> None:
        """There is nothing to let go of."""


class LoadedModel(Preprocessing):
    """A version that is ready to run. Made by `load_model`.

    Attributes:
        device: Where it runs: `cpu`, or `cuda:` and CUDA's number of the GPU.
        gpu: What the driver says of that GPU; None on the CPU.
        gpu_limit_bytes: What the engine may take of its memory; None: all that there is.
        load_s: Seconds by step: verify, open, warm_up, golden.
        measured_run_s: Seconds of one run of the largest batch that was warmed up.
        measured_rows: The rows of that batch.
        notes: What an operator should know of how it was loaded.
    """

    def __init__(
        self, version: ModelVersion, runtime: Runtime, processor: Processor | None = None
    ) -> None:
        super().__init__(version, processor)
        self.device = runtime.device
        self.gpu: GpuFacts | None = None
        self.gpu_limit_bytes: int | None = None
        self.load_s: dict[str, float] = {}
        self.measured_run_s = 0.0
        self.measured_rows = 0
        self.notes: tuple[str, ...] = ()
        self._runtime = runtime
        self._postprocess = processor.postprocess if processor else None
        self._fixed_rows = fixed_rows(self.manifest.inner_inputs, self._batched)
        self._wanted = [(spec.name, numpy_dtype(spec.datatype)) for spec in self.manifest.outputs]
        # Only Python code can return strings of other kinds than the `bytes` that BYTES are.
        self._from_code = self._postprocess is not None or self.manifest.runtime == "python"

    def run(self, batch: Tensors) -> Tensors:
        """Runs one batch, and post-processes it.

        Args:
            batch: The runtime's inputs, rows joined. Shapes: `[rows, ...]` where the model is
                batched.

        Returns:
            Exactly the manifest's outputs.

        Raises:
            ModelFailed: An output is missing, of another datatype, or has another number of rows.
            OutOfMemory: The batch does not fit into the memory of the device.
            Exception: Whatever else the model raised.
        """
        try:
            if self._fixed_rows is None:
                return self._run(batch)
            return run_fixed(self._run, batch, self._fixed_rows)
        except Exception as error:
            told = out_of_memory(error)
            if told is None:
                raise
        # Not in the handler: the error holds the frames of the run, and they its tensors.
        free_cached_memory()
        raise OutOfMemory(f"{self._name}: out of memory on {self.device}: {told}")

    def _run(self, batch: Tensors) -> Tensors:
        outputs = self._runtime.run(batch)
        if self._postprocess is not None:
            outputs = self._postprocess(batch, outputs)
        if self._from_code:
            outputs = plain_outputs(self._name, outputs)
        rows = count_rows(batch) if self._batched else -1
        for name, dtype in self._wanted:
            array = outputs.get(name)
            if (
                array is None
                or (array.dtype is not dtype and array.dtype != dtype)
                or (rows >= 0 and (array.ndim == 0 or array.shape[0] != rows))
            ):
                raise ModelFailed(_output_fault(self.manifest, name, array, rows))
        if len(outputs) != len(self._wanted):
            return {name: outputs[name] for name, _ in self._wanted}
        return outputs

    def close(self) -> None:
        """Lets go of the model."""
        self._runtime.close()


def load_preprocessing(version: ModelVersion, *, allow_code: bool) -> Preprocessing:
    """Loads what runs before the model, alone: it may run in another process than the model.

    Args:
        version: The version.
        allow_code: Whether its code may run.

    Raises:
        CodeNotAllowed: It brings code, and that is not allowed.
        DigestMismatch: A file is not the one that was pushed.
        LoadFailed: Its code cannot be loaded.
    """
    manifest = version.manifest
    check_code_allowed(manifest.runs_code, allow_code, f"{manifest.model} {manifest.version}")
    version.verify()
    return Preprocessing(version, _processor(version))


def load_model(
    version: ModelVersion,
    *,
    allow_code: bool = False,
    threads: int = 1,
    device: Device = "auto",
    gpu: Gpu | None = None,
    options: Mapping[str, Any] | None = None,
    check: bool = True,
) -> LoadedModel:
    """Loads a version and proves it.

    Args:
        version: From `Repository.version`.
        allow_code: Whether code in the version's folder may run.
        threads: Threads of one run.
        device: `auto` takes a GPU where CUDA_VISIBLE_DEVICES names one.
        gpu: Which one, and how much of it; by default the first that is visible, as a whole.
        options: The operator's, laid over the manifest's.
        check: Whether the golden example is run. The digests are checked in any case.

    Raises:
        DigestMismatch: A file is not the one that was pushed.
        CodeNotAllowed: The version runs code, and `allow_code` is false.
        LoadFailed: The runtime cannot load it, it declares something else than the manifest, or
            the model raised while warming up.
        GoldenMismatch: The golden example was not reproduced.
    """
    manifest = version.manifest
    load_s: dict[str, float] = {}
    with _timed(load_s, "verify"):
        version.verify()
    check_code_allowed(manifest.runs_code, allow_code, f"{manifest.model} {manifest.version}")
    settings = _settings(version.manifest, allow_code, threads, device, gpu or Gpu(), options or {})
    with ExitStack() as stack:
        if settings.engines is not None:
            stack.enter_context(building(settings.engines))
        with _timed(load_s, "open"), _no_collection():
            model = _open(version, settings)
        try:
            example = _example(model)
            with _timed(load_s, "warm_up"):
                warm_up(model, example)
            if check:
                with _timed(load_s, "golden"):
                    _check_golden(model, example)
        except BaseException:
            model.close()
            raise
    model.load_s = load_s
    return model


def _settings(
    manifest: Manifest,
    allow_code: bool,
    threads: int,
    device: Device,
    gpu: Gpu,
    options: Mapping[str, Any],
) -> RuntimeSettings:
    merged = merge_options(manifest.options, options)
    settings = RuntimeSettings(threads, device, merged, allow_code, gpu=gpu)
    onnx = merged.get("onnx")
    builds = isinstance(onnx, Mapping) and onnx.get("provider") == "tensorrt"
    if manifest.runtime == "onnx" and builds and settings.wants_gpu:
        try:
            settings = replace(settings, engines=engine_folder(manifest, read_gpu(gpu.index)))
        except LoadFailed:
            if device == "cuda":
                raise
    return settings


def check_code_allowed(runs_code: bool, allow_code: bool, what: str) -> None:
    """Refuses code that the operator did not allow.

    Raises:
        CodeNotAllowed: `runs_code` without `allow_code`.
    """
    if runs_code and not allow_code:
        raise CodeNotAllowed(
            f"{what} runs Python code that came with the model. Read that code; to let it run, "
            "set args.allow_code: true (on the command line: --allow-code)"
        )


@contextmanager
def _timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[step] = time.perf_counter() - started


@contextmanager
def _no_collection() -> Iterator[None]:
    """Puts off the garbage collector while an engine is imported.

    The import makes so many objects that it sets off a full collection of all that the process
    holds, which in a Ray worker takes longer than the import itself.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _open(version: ModelVersion, settings: RuntimeSettings) -> LoadedModel:
    manifest = version.manifest
    processor = _processor(version)
    reshapes = processor is not None and processor.postprocess is not None
    runtime = open_runtime(
        manifest.runtime,
        version.folder,
        manifest.file,
        settings,
        inputs=manifest.inner_inputs,
        outputs=() if reshapes else manifest.outputs,
        code=manifest.code,
    )
    problems = _signature_problems(runtime.signature(), manifest, reshapes)
    if problems:
        runtime.close()
        raise LoadFailed(
            f"{manifest.model} {manifest.version}: {manifest.file} is not what the manifest says: "
            f"{'; '.join(problems)}. Mend: push the model again"
        )
    model = LoadedModel(version, runtime, processor)
    if model.device != "cpu":
        with suppress(LoadFailed):
            model.gpu = read_gpu(settings.gpu.index)
            model.gpu_limit_bytes = memory_limit(model.gpu.total_bytes, settings.gpu.share)
    return model


def _processor(version: ModelVersion) -> Processor | None:
    manifest = version.manifest
    if manifest.code is None or manifest.runtime == "python":
        return None
    return Processor(version.folder, manifest.code, manifest.options)


def _signature_problems(declared: Signature, manifest: Manifest, reshapes: bool) -> list[str]:
    problems = []
    if declared.inputs:
        inner = {spec.name: spec for spec in manifest.inner_inputs}
        for spec in declared.inputs:
            problems.extend(_spec_problems("input", spec, inner.pop(spec.name, None)))
        problems.extend(f"the model has no input {name!r}" for name in inner)
    if declared.outputs and not reshapes:
        known = {spec.name: spec for spec in declared.outputs}
        for spec in manifest.outputs:
            if spec.name not in known:
                problems.append(f"the model has no output {spec.name!r}")
            else:
                problems.extend(_spec_problems("output", known[spec.name], spec))
    return problems


def _spec_problems(role: str, declared: TensorSpec, wanted: TensorSpec | None) -> list[str]:
    if wanted is None:
        return [f"the manifest does not name {role} {declared.name!r}"]
    if declared.datatype is not wanted.datatype:
        return [
            f"{role} {declared.name!r} is {declared.datatype}, the manifest says {wanted.datatype}"
        ]
    # A model that does not tell its number of axes declares none. The manifest may fix a size
    # that the model leaves free.
    fits = (declared.shape == () and role == "output") or (
        len(declared.shape) == len(wanted.shape)
        and all(
            -1 in pair or pair[0] == pair[1]
            for pair in zip(declared.shape, wanted.shape, strict=True)
        )
    )
    if not fits:
        return [
            f"{role} {declared.name!r} has shape {list(declared.shape)}, the manifest says "
            f"{list(wanted.shape)}"
        ]
    return []


def _output_fault(manifest: Manifest, name: str, array: Array | None, rows: int) -> str:
    where = f"{manifest.model} {manifest.version}: output {name!r}"
    if array is None:
        return f"{where} is missing"
    wanted = next(spec.datatype for spec in manifest.outputs if spec.name == name)
    if array.dtype != numpy_dtype(wanted):
        try:
            got = str(datatype_of(array))
        except ValueError:
            got = str(array.dtype)
        return f"{where} is {got}, the manifest says {wanted}"
    return f"{where} has shape {list(array.shape)}, the batch has {rows} rows"


def _example(model: LoadedModel) -> Tensors:
    """The golden example as the runtime takes it."""
    try:
        return model.prepare(model.manifest.golden.input_arrays())
    except RayprismError as error:
        raise LoadFailed(f"{model._name}: golden example: {error}") from error
    except Exception as error:
        raise LoadFailed(f"{model._name}: preprocess raised {_told(error)}") from error


def _check_golden(model: LoadedModel, example: Tensors) -> None:
    golden = model.manifest.golden
    try:
        actual = model.run(example)
    except Exception as error:
        raise LoadFailed(f"{model._name}: the golden example raised {_told(error)}") from error
    differences = compare_outputs(golden.output_arrays(), actual, golden.tolerance)
    if differences:
        raise GoldenMismatch(
            f"{model._name} on {model.device} does not reproduce its golden example: "
            f"{'; '.join(map(str, differences))}. Mend: if this machine may differ so much from "
            "the one it was pushed on, push it again with a wider tolerance"
        )


def _name(model: LoadedModel) -> str:
    return f"{model.manifest.model} {model.manifest.version}"


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
