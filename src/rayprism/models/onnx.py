"""ONNX models through ONNX Runtime, on CPU or GPU.

No code of a model runs: custom-op libraries are never registered, and the files beside a model
(external data) are read by ONNX Runtime only from inside the version's folder, whose every file
the manifest lists.

Options, under `options.onnx` of the manifest:
    graph_optimization: `all` (default), `extended`, `basic` or `disable`.

Those of `rayprism.models.onnx_gpu` stand there too, and mean nothing on the CPU.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Self

import numpy as np

from rayprism.core.tensors import Array, Datatype, Tensors, TensorSpec, suggest
from rayprism.errors import InvalidInput, LoadFailed
from rayprism.models.onnx_gpu import GPU_OPTIONS, BoundRun, gpu_providers, missing_provider
from rayprism.models.runtime import RuntimeSettings, Signature, runtime_options

__all__ = ["OnnxRuntime"]

_log = logging.getLogger(__name__)

# Source: names of element types in onnxruntime's NodeArg.type, "tensor(...)".
_DATATYPES = {
    "tensor(bool)": Datatype.BOOL,
    "tensor(uint8)": Datatype.UINT8,
    "tensor(uint16)": Datatype.UINT16,
    "tensor(uint32)": Datatype.UINT32,
    "tensor(uint64)": Datatype.UINT64,
    "tensor(int8)": Datatype.INT8,
    "tensor(int16)": Datatype.INT16,
    "tensor(int32)": Datatype.INT32,
    "tensor(int64)": Datatype.INT64,
    "tensor(float16)": Datatype.FP16,
    "tensor(float)": Datatype.FP32,
    "tensor(double)": Datatype.FP64,
    "tensor(string)": Datatype.BYTES,
}
_OPTIONS = {"graph_optimization": ("all", "extended", "basic", "disable"), **GPU_OPTIONS}
_CPU = "CPUExecutionProvider"
# Errors are raised; on standard error they would only be there twice, without a request id.
_FATAL_ONLY = 4


class OnnxRuntime:
    """A session of ONNX Runtime. Opened with `OnnxRuntime.open`."""

    def __init__(
        self, session: Any, device: str, signature: Signature, outputs: tuple[TensorSpec, ...]
    ) -> None:
        self.device = device
        self._session = session
        self._signature = signature
        self._names = [spec.name for spec in outputs]
        self._string_inputs = _of_strings(signature.inputs)
        self._string_outputs = _of_strings(outputs)
        self._strings = bool(self._string_inputs or self._string_outputs)
        self._bound: BoundRun | None = None
        if device != "cpu" and not self._strings:  # strings are only ever on the CPU
            self._bound = BoundRun(session, self._names, device)

    @classmethod
    def open(
        cls,
        folder: Path,
        file: str,
        settings: RuntimeSettings,
        *,
        outputs: tuple[TensorSpec, ...] = (),
    ) -> Self:
        """Loads a model.

        Args:
            folder: The version's folder.
            file: The model file in it.
            settings: Threads, device and options.
            outputs: Which outputs to compute; by default all.

        Raises:
            LoadFailed: onnxruntime is not installed, the file is not a model that it can load, a
                tensor is of a type that cannot be served, or a GPU was asked for and not got.
        """
        options = runtime_options(settings, "onnx", _OPTIONS)
        session, device = _open_session(folder / file, settings, options)
        signature = Signature(
            inputs=tuple(_spec(file, "input", arg) for arg in session.get_inputs()),
            outputs=tuple(_spec(file, "output", arg) for arg in session.get_outputs()),
        )
        declared = {spec.name: spec for spec in signature.outputs}
        for wanted in outputs:
            if wanted.name not in declared:
                raise LoadFailed(
                    f"{file}: it has no output {wanted.name!r}."
                    f"{suggest(wanted.name, declared)} Its outputs: {', '.join(declared)}"
                )
        chosen = tuple(declared[spec.name] for spec in outputs) or signature.outputs
        return cls(session, device, signature, chosen)

    def signature(self) -> Signature:
        """As the graph declares it; named and unknown sizes are -1."""
        return self._signature

    def run(self, inputs: Tensors) -> Tensors:
        """Runs one batch."""
        if self._bound is not None:
            return self._bound(inputs)
        if self._strings:
            return self._run_strings(inputs)
        names = self._names
        return dict(zip(names, self._session.run(names, inputs), strict=False))

    def _run_strings(self, inputs: Tensors) -> Tensors:
        feed = dict(inputs)
        for name in self._string_inputs:
            # Batch jobs give `str`, as Arrow has it.
            feed[name] = _to_text(name, inputs[name])
        outputs = dict(zip(self._names, self._session.run(self._names, feed), strict=True))
        for name in self._string_outputs:
            outputs[name] = _to_bytes(outputs[name])
        return outputs

    def close(self) -> None:
        """Lets go of the session."""
        self._session = self._bound = None


def _of_strings(specs: tuple[TensorSpec, ...]) -> tuple[str, ...]:
    return tuple(spec.name for spec in specs if spec.datatype is Datatype.BYTES)


_MANY_STRINGS = 1024


def _to_text(name: str, array: Array) -> Array:
    items = array.ravel().tolist()
    if items and type(items[0]) is str:
        return array
    text = np.empty(array.size, object)
    try:
        if len(items) < _MANY_STRINGS:
            text[:] = [item.decode() for item in items]
        else:
            # Categories, which many strings mostly are, come again and again: each is decoded once.
            known = {item: item.decode() for item in set(items)}
            text[:] = [known[item] for item in items]
    except UnicodeDecodeError as error:
        raise InvalidInput(f"input {name!r}: an element is not UTF-8 ({error.reason})") from None
    return text.reshape(array.shape)


def _to_bytes(array: Array) -> Array:
    raw = np.empty(array.size, object)
    raw[:] = [item.encode() for item in array.ravel()]
    return raw.reshape(array.shape)


def _open_session(
    path: Path, settings: RuntimeSettings, options: dict[str, Any]
) -> tuple[Any, str]:
    try:
        import onnxruntime
    except ImportError as error:
        raise LoadFailed(
            f"onnxruntime cannot be imported ({error}). Install it: pip install 'rayprism[cpu]', "
            "or 'rayprism[gpu]' for CUDA"
        ) from error
    if settings.wants_gpu:
        try:
            return _open_on_gpu(onnxruntime, path, settings, options)
        except _NoGpu as error:
            if settings.device == "cuda":
                raise LoadFailed(f"{error}; or set device: cpu") from error
            _log.warning("%s; running on the CPU", error)
    return _make_session(onnxruntime, path, settings, options, [_CPU]), "cpu"


class _NoGpu(LoadFailed):
    """The model runs, but not on a GPU."""


def _open_on_gpu(
    onnxruntime: Any,
    path: Path,
    settings: RuntimeSettings,
    options: dict[str, Any],
) -> tuple[Any, str]:
    missing = missing_provider(onnxruntime, options)
    if missing:
        raise _NoGpu(f"{path.name}: a GPU was asked for, and {missing}")
    # CUDA libraries from Python packages are not on the loader's path by themselves.
    onnxruntime.preload_dlls()
    providers = [*gpu_providers(path.name, settings, options), _CPU]
    session = _make_session(onnxruntime, path, settings, options, providers)
    # Only the session knows: a provider that fails to start is dropped in silence.
    active, wanted = session.get_providers(), providers[0][0]
    if wanted not in active:
        raise _NoGpu(
            f"{path.name}: a GPU was asked for with {wanted}, and onnxruntime runs this model with "
            f"{', '.join(active)}. {_GPU_HINT}"
        )
    # Else a run that fails there is tried again on the CPU, in silence and from then on.
    session.disable_fallback()
    return session, f"cuda:{settings.gpu.index}"


_GPU_HINT = (
    "Check that CUDA 13 and cuDNN 9 are installed (nvidia-smi; pip install "
    "'onnxruntime-gpu[cuda,cudnn]'), TensorRT 10 where it is asked for (pip install "
    "'rayprism[tensorrt]'), and that CUDA_VISIBLE_DEVICES names a device"
)


def _make_session(
    onnxruntime: Any,
    path: Path,
    settings: RuntimeSettings,
    options: dict[str, Any],
    providers: list[Any],
) -> Any:
    try:
        return onnxruntime.InferenceSession(
            str(path),
            _session_options(onnxruntime, settings.threads, options["graph_optimization"]),
            providers=providers,
            # It would print what went wrong, and go on with other providers.
            enable_fallback=0,
        )
    except Exception as error:
        raise LoadFailed(_load_message(path.name, error, onnxruntime)) from error


def _session_options(onnxruntime: Any, threads: int, optimization: str) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = _FATAL_ONLY
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = {
        "all": level.ORT_ENABLE_ALL,
        "extended": level.ORT_ENABLE_EXTENDED,
        "basic": level.ORT_ENABLE_BASIC,
        "disable": level.ORT_DISABLE_ALL,
    }[optimization]
    # Idle threads that spin take the CPU from the event loop that serves the next request.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    return options


def _load_message(name: str, error: Exception, onnxruntime: Any) -> str:
    text = " ".join(str(error).split())
    if any(word in text.lower() for word in ("cuda", "tensorrt", "cudnn")):
        hint = _GPU_HINT[0].lower() + _GPU_HINT[1:]
    elif "opset" in text.lower():
        hint = (
            f"onnxruntime {onnxruntime.__version__} does not know this opset: export the model "
            "with a lower one (opset_version=..., target_opset=...), or upgrade onnxruntime"
        )
    elif "IR version" in text:
        hint = "save the model with an older ir_version, or upgrade onnxruntime"
    elif "custom" in text.lower() or "is not a registered function/op" in text:
        hint = "operators outside ONNX are not loaded: export the model with standard operators"
    elif "external" in text.lower():
        hint = "push the folder that holds the model and its external data, with nothing outside it"
    elif "protobuf" in text.lower():
        hint = "it is not an ONNX model, or was cut short: export or copy it again"
    else:
        hint = "check it with onnx.checker.check_model, and export it again"
    return f"{name}: onnxruntime cannot load it: {text[:600]}. Mend: {hint}"


def _spec(file: str, role: str, arg: Any) -> TensorSpec:
    datatype = _DATATYPES.get(arg.type)
    if datatype is None:
        raise LoadFailed(
            f"{file}: {role} {arg.name!r} is a {arg.type}. Mend: {_type_hint(arg.type)}"
        )
    shape = tuple(size if isinstance(size, int) and size > 0 else -1 for size in arg.shape or ())
    try:
        return TensorSpec(arg.name, datatype, shape)
    except ValueError as error:
        raise LoadFailed(f"{file}: {role} {error}. Mend: rename it in the graph") from None


def _type_hint(type_name: str) -> str:
    if type_name.startswith("seq(map("):
        return (
            "a classifier's probabilities came out as dictionaries (ZipMap). Convert it with "
            "options={'zipmap': False}, as in skl2onnx.to_onnx(model, X, options={'zipmap': False})"
        )
    if type_name.startswith(("seq(", "map(", "optional(", "sparse_tensor(")):
        return "only tensors can be served: end the graph in plain tensors"
    if type_name == "tensor(bfloat16)":
        return "put a Cast to float at the edge of the graph; inside it bfloat16 is fine"
    return f"put a Cast at the edge of the graph to one of {', '.join(_DATATYPES)}"
