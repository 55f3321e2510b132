"""What NVIDIA's management library says of a GPU while a process uses it.

It is asked through the package nvidia-ml-py, which `rayprism[gpu]` brings; without it there are no
readings, and nothing else changes.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

__all__ = ["GpuMeter", "GpuReading"]


class GpuReading(NamedTuple):
    """One reading; None for what is not told.

    Args:
        used_bytes: Memory that this process has on the GPU. In a container that has process ids of
            its own, NVML does not know it.
        utilization: Share of the last moments, up to a second, in which a kernel ran; of whatever
            process. None of a MIG slice.
    """

    used_bytes: float | None = None
    utilization: float | None = None


class GpuMeter:
    """Reads one GPU. Made by `GpuMeter.open`.

    Attributes:
        reading: The last one; readers on other threads look at it.
    """

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml = nvml
        self._handle = handle
        self._pid = os.getpid()
        self.reading = GpuReading()

    @classmethod
    def open(cls, uuid: str) -> GpuMeter | None:
        """Finds a GPU by its UUID; None where NVML or its Python package is not there."""
        try:
            import pynvml
        except ImportError:
            return None
        try:
            pynvml.nvmlInit()
            return cls(pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid))
        except pynvml.NVMLError:
            return None

    def read(self) -> None:
        """Takes a reading. Blocks for some milliseconds."""
        self.reading = GpuReading(self._used_bytes(), self._utilization())

    def _used_bytes(self) -> float | None:
        try:
            processes = self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle)
        except self._nvml.NVMLError:
            return None
        mine = [process.usedGpuMemory for process in processes if process.pid == self._pid]
        return float(mine[0]) if mine and mine[0] is not None else None

    def _utilization(self) -> float | None:
        try:
            percent = self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu
        except self._nvml.NVMLError:
            return None
        return float(percent) / 100
