"""Which errors mean that memory ran out, whatever engine raised them."""

from __future__ import annotations

import sys

__all__ = ["free_cached_memory", "out_of_memory"]

# Source: messages of ONNX Runtime's arenas and of its checks of CUDA, cuBLAS and cuDNN calls, and
# of torch's allocator on the CPU, which have no type of their own.
_TEXTS = (
    "failed to allocate memory",
    "out of memory",
    "is smaller than requested bytes",
    "bad_alloc",
    "alloc_failed",
    "allocation_failed",
    "can't allocate memory",
)
_MOST_TOLD = 300


def out_of_memory(error: BaseException) -> str | None:
    """What an engine said when memory ran out; None where the error is another one.

    Known are MemoryError, torch's OutOfMemoryError, and by their texts what ONNX Runtime raises
    and what torch raises of cuBLAS, cuDNN and the CPU.
    """
    kind = type(error)
    engine = kind.__module__.partition(".")[0]
    told = " ".join(str(error).split())
    known = isinstance(error, MemoryError) or kind.__name__ == "OutOfMemoryError"
    if not known and (engine == "onnxruntime" or isinstance(error, RuntimeError)):
        known = any(text in told.lower() for text in _TEXTS)
    return f"{kind.__name__}: {told[:_MOST_TOLD].rstrip('. ')}" if known else None


def free_cached_memory() -> None:
    """Gives back what torch keeps for later, so that a smaller batch finds it in one piece.

    ONNX Runtime keeps its memory: its arena uses it again by itself.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
