"""Whether tests can use a GPU here: `python -m tests.support.cuda` says what is missing."""

from __future__ import annotations

import sys

import pytest

from rayprism.errors import LoadFailed
from rayprism.models.gpu import read_gpu

__all__ = ["needs_gpu", "what_is_missing"]

_BUILT_FOR_GPUS = "pip uninstall onnxruntime, then pip install 'onnxruntime-gpu[cuda,cudnn]'"


def what_is_missing() -> list[str]:
    """What tests marked `gpu` need and this machine does not have; nothing where they can run."""
    missing = []
    try:
        read_gpu(0)
    except LoadFailed as error:
        missing.append(f"an NVIDIA GPU: {error}")
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        missing.append(f"onnxruntime with CUDA ({_BUILT_FOR_GPUS})")
    try:
        import torch

        if not torch.cuda.is_available():
            missing.append(f"torch with CUDA (it is {torch.__version__} here, and sees no GPU)")
    except ImportError:
        missing.append("torch (pip install torch)")
    return missing


_MISSING = what_is_missing()
needs_gpu = pytest.mark.skipif(bool(_MISSING), reason=f"no GPU to test with: {'; '.join(_MISSING)}")


if __name__ == "__main__":
    if _MISSING:
        sys.exit("The tests of GPUs need:\n  " + "\n  ".join(_MISSING))
