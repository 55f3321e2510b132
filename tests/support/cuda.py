"""Whether tests can use a GPU here."""

from __future__ import annotations

import pytest

from rayprism.errors import LoadFailed
from rayprism.models.gpu import read_gpu

__all__ = ["needs_gpu"]


def _what_is_missing() -> list[str]:
    missing = []
    try:
        read_gpu(0)
    except LoadFailed:
        missing.append("an NVIDIA GPU with its driver (nvidia-smi)")
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        missing.append(f"onnxruntime with CUDA (this is {onnxruntime.__version__} without)")
    try:
        import torch

        if not torch.cuda.is_available():
            missing.append(f"torch with CUDA (this is {torch.__version__}, and sees no GPU)")
    except ImportError:
        missing.append("torch")
    return missing


_MISSING = _what_is_missing()
needs_gpu = pytest.mark.skipif(bool(_MISSING), reason=f"missing: {'; '.join(_MISSING)}")
