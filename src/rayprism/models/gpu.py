"""Which GPU a process may use, how much of it, and what the driver says of it.

The driver is asked through its own library, which is there wherever CUDA is: it counts devices as
CUDA does, by CUDA_VISIBLE_DEVICES, which NVML does not.
"""

from __future__ import annotations

import ctypes
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rayprism.errors import LoadFailed

__all__ = [
    "Device",
    "Gpu",
    "GpuFacts",
    "choose_device",
    "gpu_is_assigned",
    "memory_limit",
    "read_gpu",
]

Device = Literal["auto", "cpu", "cuda"]

_VISIBLE = "CUDA_VISIBLE_DEVICES"
# What CUDA_VISIBLE_DEVICES says where a process is to see no GPU.
_NO_DEVICE = frozenset({"", "-1", "NoDevFiles", "none", "void"})
_DRIVER = "libcuda.so.1"
_CONTEXT_BYTES = 512 * 1024**2
"""What CUDA and the kernels of an engine take for themselves in each process, about."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """The GPU, or the part of one, that a process may use.

    Args:
        index: CUDA's number of it, among those that the process sees.
        share: Of its memory, more than 0 to 1.
    """

    index: int = 0
    share: float = 1.0

    def __post_init__(self) -> None:
        if self.index < 0 or not 0 < self.share <= 1:
            raise ValueError(f"{self}: index 0 or more, share more than 0 to 1")


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """What the driver says of a GPU.

    Args:
        name: As NVIDIA calls it.
        uuid: As `nvidia-smi -L` shows it, `GPU-...`; of a MIG slice its own, `MIG-...`.
        total_bytes: Its memory.
    """

    name: str
    uuid: str
    total_bytes: int


def gpu_is_assigned() -> bool:
    """Whether CUDA_VISIBLE_DEVICES names a device for this process."""
    return os.environ.get(_VISIBLE, "").strip() not in _NO_DEVICE


def choose_device(
    wanted: Device,
    assigned: Sequence[str],
    gpus: float,
    environment: Mapping[str, str] = os.environ,
) -> tuple[Device, Gpu]:
    """Where a model runs in a process of Ray: on the GPU that Ray assigned, or on the CPU.

    The environment alone does not tell: Ray leaves CUDA_VISIBLE_DEVICES as it was for a process
    that asked for no GPU.

    Args:
        wanted: What the operator says.
        assigned: Ray's ids of the process' GPUs. Of several, the first one is used.
        gpus: How many the process has, as Ray counts them; below 1 it is a share of one.
        environment: For CUDA_VISIBLE_DEVICES.

    Raises:
        LoadFailed: A GPU is wanted, and Ray assigned none.
    """
    if wanted == "cpu" or (wanted == "auto" and not assigned):
        return "cpu", Gpu()
    if not assigned:
        raise LoadFailed(
            "device cuda was asked for, and Ray assigned no GPU to this process. Mend: give it "
            "one, or a part: ray_actor_options: {num_gpus: 1} in a Serve file, pool: {gpus: 1} in "
            "a job's; or set device: cpu"
        )
    visible = [name.strip() for name in environment.get(_VISIBLE, "").split(",") if name.strip()]
    if visible:
        # Ray names here what it assigned, unless it was told not to.
        places = [visible.index(name) for name in assigned if name in visible]
    else:
        places = [int(name) for name in assigned if name.isdecimal()]
    return "cuda", Gpu(min(places, default=0), min(gpus, 1.0) if gpus > 0 else 1.0)


def memory_limit(total_bytes: int, share: float) -> int | None:
    """What an engine may take for tensors; None: as much as there is.

    So that the parts of a GPU together fit into it, what CUDA itself takes in each process comes
    off; of a very small part at most half.

    Args:
        total_bytes: Of the GPU.
        share: That the process may use.
    """
    if share >= 1:
        return None
    part = int(total_bytes * share)
    return max(part - _CONTEXT_BYTES, part // 2)


def read_gpu(index: int, driver: Any = None) -> GpuFacts:
    """Asks the driver about a GPU.

    Args:
        index: CUDA's number of it, among those that the process sees.
        driver: The driver's library; by default the machine's.

    Raises:
        LoadFailed: There is no driver, or no such GPU.
    """
    if driver is None:
        try:
            driver = ctypes.CDLL(_DRIVER)
        except OSError as error:
            raise LoadFailed(
                f"a GPU was asked for, and this machine has no NVIDIA driver ({error}). Check "
                "nvidia-smi; in a container, that it was given the GPU; or set device: cpu"
            ) from None
    device, total = ctypes.c_int(), ctypes.c_size_t()
    name, raw = ctypes.create_string_buffer(256), ctypes.create_string_buffer(16)
    # Source: CUDA driver API, cuInit to cuDeviceGetUuid_v2, which tells slices of MIG apart.
    _ask(driver, "cuInit", ctypes.c_uint(0))
    _ask(driver, "cuDeviceGet", ctypes.byref(device), ctypes.c_int(index))
    _ask(driver, "cuDeviceGetName", name, ctypes.c_int(256), device)
    _ask(driver, "cuDeviceTotalMem_v2", ctypes.byref(total), device)
    _ask(driver, "cuDeviceGetUuid_v2", raw, device)
    shown = name.value.decode(errors="replace")
    kind = "MIG" if "MIG" in shown else "GPU"
    return GpuFacts(shown, f"{kind}-{uuid.UUID(bytes=raw.raw)}", total.value)


def _ask(driver: Any, function: str, *arguments: Any) -> None:
    status = getattr(driver, function)(*arguments)
    if status:
        raise LoadFailed(
            f"a GPU was asked for, and the NVIDIA driver answered {function} with error {status}. "
            f"Check nvidia-smi, and that {_VISIBLE} names a GPU; or set device: cpu"
        )
