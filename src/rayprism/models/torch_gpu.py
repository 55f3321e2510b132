"""torch on a GPU: copies through page-locked memory, precision, compilation, a part of the memory.

Options, under `options.torch` of the manifest or of the operator; on the CPU they mean nothing:
    autocast: `float16` or `bfloat16`: what gains most by it is computed in that; default: nothing.
        Outputs keep the datatypes of the manifest.
    compile: `default`, or `max-autotune`, which tries more kernels and takes longer to load;
        default: not at all. Batches of any size share what was compiled. Needs a C compiler where
        it runs, and a torch.export archive.
    tf32: Whether the factors of FP32 products may be rounded to 10 bits. By default not, so that
        answers are those of the CPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import ml_dtypes
import numpy as np

from rayprism.core.tensors import Array, Tensors, TensorSpec, numpy_dtype
from rayprism.models.gpu import Gpu, memory_limit, read_gpu

__all__ = ["BF16", "GPU_OPTIONS", "TorchGpu", "to_array"]

GPU_OPTIONS: dict[str, tuple[Any, ...]] = {
    "autocast": (False, "float16", "bfloat16"),
    "compile": (False, "default", "max-autotune"),
    "tf32": (False, True),
}
# Without CUDA graphs, which belong to the thread that made them; a model is loaded in another one
# than it runs in.
_MODES = {"default": "default", "max-autotune": "max-autotune-no-cudagraphs"}
BF16 = np.dtype(ml_dtypes.bfloat16)


class TorchGpu:
    """What one model needs beside its module, to run on a GPU.

    Args:
        torch: The module.
        device: `cuda:` and CUDA's number; `cpu` in tests, where nothing is page-locked.
        gpu: How much of it may be used.
        options: Of the runtime, checked.

    Raises:
        LoadFailed: The GPU cannot be asked for its memory, a part of which is to be used.
    """

    def __init__(self, torch: Any, device: str, gpu: Gpu, options: Mapping[str, Any]) -> None:
        self.compiles = bool(options["compile"])
        self._torch = torch
        self._device = torch.device(device)
        self._on_cuda: bool = self._device.type == "cuda"
        self._mode = _MODES.get(options["compile"])
        self._autocast = getattr(torch, options["autocast"]) if options["autocast"] else None
        self._datatypes: dict[str, Any] = {}
        if self._on_cuda:
            self._limit_memory(gpu)
        with warnings.catch_warnings():
            # The newer names for these cannot be mixed with what torch.compile reads itself.
            warnings.simplefilter("ignore")
            torch.backends.cuda.matmul.allow_tf32 = bool(options["tf32"])
            torch.backends.cudnn.allow_tf32 = bool(options["tf32"])

    def _limit_memory(self, gpu: Gpu) -> None:
        if gpu.share < 1:
            total = read_gpu(gpu.index).total_bytes
            limit = memory_limit(total, gpu.share) or total
            self._torch.cuda.set_per_process_memory_fraction(limit / total, self._device)

    def expect(self, outputs: Sequence[TensorSpec]) -> None:
        """Which datatypes outputs are to have, whatever autocast makes of them."""
        self._datatypes = {
            spec.name: getattr(self._torch, numpy_dtype(spec.datatype).name)
            for spec in outputs
            if spec.datatype.is_float
        }

    def compile(self, module: Callable[..., Any]) -> Callable[..., Any]:
        """The module, compiled if that is asked for: at its first runs, while warming up."""
        if not self.compiles:
            return module
        compiled: Callable[..., Any] = self._torch.compile(module, dynamic=True, mode=self._mode)
        return compiled

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around a run, and the copies before and after it."""
        with ExitStack() as stack:
            if self._on_cuda:
                stack.enter_context(self._torch.cuda.device(self._device))
            if self._autocast is not None:
                stack.enter_context(self._torch.autocast(self._device.type, self._autocast))
            yield

    def put(self, array: Array) -> Any:
        """Copies an input to the GPU; the CPU does not wait for it."""
        host = self._host(array.shape, getattr(self._torch, array.dtype.name))
        if array.dtype == BF16:
            host.view(self._torch.int16).numpy()[...] = array.view(np.int16)
        else:
            host.numpy()[...] = array
        return host.to(self._device, non_blocking=True)

    def fetch(self, outputs: Mapping[str, Any]) -> Tensors:
        """Copies outputs from the GPU, all at once, in the datatypes of the manifest."""
        hosts = {}
        for name, output in outputs.items():
            tensor = output.detach()
            if self._autocast is not None and tensor.is_floating_point():
                tensor = tensor.to(self._datatypes.get(name, tensor.dtype))
            hosts[name] = self._host(tensor.shape, tensor.dtype).copy_(tensor, non_blocking=True)
        if self._on_cuda:
            self._torch.cuda.current_stream(self._device).synchronize()
        return {name: to_array(self._torch, host) for name, host in hosts.items()}

    def _host(self, shape: Sequence[int], dtype: Any) -> Any:
        return self._torch.empty(tuple(shape), dtype=dtype, pin_memory=self._on_cuda)


def to_array(torch: Any, tensor: Any) -> Array:
    """A tensor on the CPU as an array."""
    tensor = tensor.detach().cpu()
    array: Array
    if tensor.dtype is torch.bfloat16:
        array = tensor.contiguous().view(torch.int16).numpy().view(BF16)
    else:
        array = tensor.numpy()
    return array
