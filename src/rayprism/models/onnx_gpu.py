"""ONNX Runtime on a GPU: its providers CUDA and TensorRT, and tensors that are bound to the device.

Options, under `options.onnx` of the manifest or of the operator; on the CPU they mean nothing:
    provider: `cuda` (default), or `tensorrt`, which builds an engine for this GPU first and keeps
        it (`rayprism.models.engines`).
    cudnn_conv_algo_search: `heuristic` (default), `exhaustive` or `default`. ONNX Runtime's own
        default, `exhaustive`, tries every algorithm at each new batch size.
    fp16: Whether TensorRT may compute in half precision. CUDA computes in what the graph says.
    tf32: Whether CUDA may round the factors of FP32 products to 10 bits. By default not, so that
        answers are those of the CPU; TensorRT always may.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any

from rayprism.core.tensors import Tensors
from rayprism.errors import LoadFailed
from rayprism.models.gpu import memory_limit, read_gpu
from rayprism.models.runtime import RuntimeSettings

__all__ = ["CUDA", "GPU_OPTIONS", "TENSORRT", "BoundRun", "gpu_providers", "missing_provider"]

CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"
GPU_OPTIONS: dict[str, tuple[Any, ...]] = {
    "provider": ("cuda", "tensorrt"),
    "cudnn_conv_algo_search": ("heuristic", "exhaustive", "default"),
    "fp16": (False, True),
    "tf32": (False, True),
}


def missing_provider(onnxruntime: Any, options: Mapping[str, Any]) -> str | None:
    """What this onnxruntime was built without, and how to mend it; None where nothing is missing.

    Args:
        onnxruntime: The module.
        options: Of the runtime, checked.
    """
    name = TENSORRT if options["provider"] == "tensorrt" else CUDA
    if name in onnxruntime.get_available_providers():
        return None
    return (
        f"this onnxruntime was built without {name.removesuffix('ExecutionProvider')}. Mend: pip "
        "uninstall onnxruntime, then pip install 'rayprism[gpu]'"
    )


def gpu_providers(
    file: str,
    settings: RuntimeSettings,
    options: Mapping[str, Any],
) -> list[tuple[str, dict[str, str]]]:
    """The providers of a session, the wanted one first, with what each is told.

    Args:
        file: The model's, for messages.
        settings: Which GPU and how much of it, where engines are kept.
        options: Of the runtime, checked.

    Raises:
        LoadFailed: Options that do not fit together; or the GPU cannot be asked for its memory,
            a part of which is to be used.
    """
    gpu = settings.gpu
    limit = None
    if gpu.share < 1:
        limit = memory_limit(read_gpu(gpu.index).total_bytes, gpu.share)
    cuda = {
        "device_id": str(gpu.index),
        "cudnn_conv_algo_search": options["cudnn_conv_algo_search"].upper(),
        "use_tf32": "1" if options["tf32"] else "0",
    }
    if limit is not None:
        cuda["gpu_mem_limit"] = str(limit)
        # Doubling would run into the limit at half of it.
        cuda["arena_extend_strategy"] = "kSameAsRequested"
    if options["provider"] == "cuda":
        if options["fp16"]:
            raise LoadFailed(
                f"{file}: options.onnx.fp16 needs provider: tensorrt. CUDA computes in what the "
                "graph says: convert the model to float16, and push that"
            )
        return [(CUDA, cuda)]
    # No profile of sizes: it would have to name the inputs of every part into which the graph may
    # be cut for TensorRT. Without one it goes by what it sees, and the warm-up shows it all.
    tensorrt = {
        "device_id": str(gpu.index),
        "trt_fp16_enable": "1" if options["fp16"] else "0",
    }
    if limit is not None:
        tensorrt["trt_max_workspace_size"] = str(limit)
    if settings.engines is not None:
        folder = str(settings.engines)
        tensorrt |= {
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": folder,
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": folder,
        }
    with suppress(ImportError, OSError):
        # Loads TensorRT's libraries, which as a Python package are on no path of the loader.
        import_module("tensorrt")
    # What TensorRT does not know runs with CUDA.
    return [(TENSORRT, tensorrt), (CUDA, cuda)]


class BoundRun:
    """Runs a session whose inputs and outputs are bound to its GPU: copied there first, back last.

    ONNX Runtime makes the copies, in the arena of the session. Values made on the GPU beforehand
    (`OrtValue`) would lie in an arena of their own, which knows no limit.

    Args:
        session: On a GPU.
        outputs: Their names.
        device: `cuda:` and CUDA's number; `cpu` in tests.
    """

    def __init__(self, session: Any, outputs: Sequence[str], device: str) -> None:
        self._session = session
        self._outputs = list(outputs)
        self._type, _, index = device.partition(":")
        self._index = int(index or 0)

    def __call__(self, inputs: Tensors) -> Tensors:
        """Runs one batch."""
        binding = self._session.io_binding()
        for name, array in inputs.items():
            binding.bind_cpu_input(name, array)
        for name in self._outputs:
            binding.bind_output(name, self._type, self._index)
        self._session.run_with_iobinding(binding)
        return dict(zip(self._outputs, binding.copy_outputs_to_cpu(), strict=True))
