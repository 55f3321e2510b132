"""What NVML is asked of a GPU, and that nothing depends on its being there."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from rayprism.telemetry.gpu import GpuMeter, GpuReading


class NVMLError(Exception):
    pass


class StandInNvml:
    """Stand-in for nvidia-ml-py's module `pynvml`: one GPU, whose processes the test names."""

    NVMLError = NVMLError

    def __init__(self, fail: frozenset[str] = frozenset()) -> None:
        self.fail = fail
        self.processes: list[Any] = []
        self.percent = 0

    def _check(self, function: str) -> None:
        if function in self.fail:
            raise NVMLError(function)

    def nvmlInit(self) -> None:  # noqa: N802
        self._check("init")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Any:  # noqa: N802
        self._check("handle")
        assert uuid == "GPU-1"
        return "handle"

    def nvmlDeviceGetComputeRunningProcesses(self, handle: Any) -> list[Any]:  # noqa: N802
        self._check("processes")
        assert handle == "handle"
        return self.processes

    def nvmlDeviceGetUtilizationRates(self, handle: Any) -> Any:  # noqa: N802
        self._check("utilization")
        return SimpleNamespace(gpu=self.percent, memory=3)


def opened(nvml: Any, monkeypatch: pytest.MonkeyPatch) -> GpuMeter | None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    return GpuMeter.open("GPU-1")


def process(pid: int, used: int | None) -> Any:
    return SimpleNamespace(pid=pid, usedGpuMemory=used)


def test_readings_are_of_this_process_and_of_the_whole_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = StandInNvml()
    meter = opened(nvml, monkeypatch)
    assert meter is not None
    assert meter.reading == GpuReading(None, None), "none was taken yet"
    nvml.processes, nvml.percent = [process(1, 5), process(os.getpid(), 700)], 37
    meter.read()
    assert meter.reading == GpuReading(700.0, 0.37)


@pytest.mark.parametrize("processes", [[], [process(1, 5)], [process(os.getpid(), None)]])
def test_what_nvml_does_not_know_is_not_told(
    monkeypatch: pytest.MonkeyPatch, processes: list[Any]
) -> None:
    """As in a container with process ids of its own."""
    nvml = StandInNvml()
    meter = opened(nvml, monkeypatch)
    assert meter is not None
    nvml.processes = processes
    meter.read()
    assert meter.reading == GpuReading(None, 0.0)


@pytest.mark.parametrize("function", ["processes", "utilization"])
def test_what_cannot_be_read_leaves_the_other_reading(
    monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    nvml = StandInNvml(frozenset({function}))
    meter = opened(nvml, monkeypatch)
    assert meter is not None
    nvml.processes = [process(os.getpid(), 700)]
    meter.read()
    assert (meter.reading.used_bytes is None) is (function == "processes")
    assert (meter.reading.utilization is None) is (function == "utilization")


@pytest.mark.parametrize("function", ["init", "handle"])
def test_without_a_driver_there_is_no_meter(monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    assert opened(StandInNvml(frozenset({function})), monkeypatch) is None


def test_without_the_package_there_is_no_meter(monkeypatch: pytest.MonkeyPatch) -> None:
    assert opened(None, monkeypatch) is None


def test_the_real_package_has_what_is_asked_for() -> None:
    pynvml = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    for name in vars(StandInNvml):
        if name.startswith("nvml") or name == "NVMLError":
            assert hasattr(pynvml, name)
