"""Which GPU a process may use, and what the driver is asked."""

from __future__ import annotations

import ctypes
import uuid
from collections.abc import Sequence
from typing import Any

import pytest

from rayprism.errors import LoadFailed
from rayprism.models.gpu import Gpu, GpuFacts, choose_device, memory_limit, read_gpu

GIB = 1024**3


@pytest.mark.parametrize(
    ("wanted", "assigned", "gpus", "visible", "expected"),
    [
        # As Ray has it: CUDA_VISIBLE_DEVICES names what was assigned.
        ("auto", ["3"], 1, "3", ("cuda", Gpu(0, 1.0))),
        ("cuda", ["3"], 0.25, "3", ("cuda", Gpu(0, 0.25))),
        ("auto", ["2", "1"], 2, "1,2", ("cuda", Gpu(0, 1.0))),
        ("auto", ["GPU-5e1f"], 0.5, "GPU-5e1f", ("cuda", Gpu(0, 0.5))),
        # Told not to set it (RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES).
        ("auto", ["3"], 0.5, None, ("cuda", Gpu(3, 0.5))),
        ("auto", ["3"], 0.5, "1, 3", ("cuda", Gpu(1, 0.5))),
        # A process without a GPU inherits what its node sees.
        ("auto", [], 0, "0,1", ("cpu", Gpu())),
        ("auto", [], 0, None, ("cpu", Gpu())),
        ("cpu", ["0"], 1, "0", ("cpu", Gpu())),
        # GPUs of a placement group count under another name: the share is not known.
        ("auto", ["0"], 0, "0", ("cuda", Gpu(0, 1.0))),
    ],
)
def test_a_process_of_ray_runs_where_ray_says(
    wanted: Any, assigned: list[str], gpus: float, visible: str | None, expected: Any
) -> None:
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert choose_device(wanted, assigned, gpus, environment) == expected


def test_a_gpu_that_was_asked_for_and_not_assigned() -> None:
    with pytest.raises(LoadFailed, match=r"Ray assigned no GPU .*\{num_gpus: 1\}"):
        choose_device("cuda", [], 0, {"CUDA_VISIBLE_DEVICES": "0,1"})


@pytest.mark.parametrize(("index", "share"), [(-1, 1.0), (0, 0.0), (0, 1.5)])
def test_parts_of_a_gpu_are_more_than_none_and_one_at_most(index: int, share: float) -> None:
    with pytest.raises(ValueError, match="share more than 0 to 1"):
        Gpu(index, share)


def test_a_whole_gpu_has_no_limit() -> None:
    assert memory_limit(80 * GIB, 1.0) is None


@pytest.mark.parametrize("parts", [2, 3, 4, 8])
def test_parts_leave_room_for_what_cuda_takes_in_each(parts: int) -> None:
    limit = memory_limit(80 * GIB, 1 / parts)
    assert limit is not None
    assert parts * (limit + GIB // 2) <= 80 * GIB
    assert limit > 0.9 * 80 * GIB / parts


def test_a_very_small_part_is_not_all_taken_away() -> None:
    assert memory_limit(8 * GIB, 0.05) == int(8 * GIB * 0.05) // 2


UUID = uuid.UUID("5e1f0c3a-0102-0304-0506-0708090a0b0c")


class StandInDriver:
    """Stand-in for libcuda: C functions with the driver's signatures, for one device."""

    def __init__(self, name: bytes = b"NVIDIA H100 80GB HBM3", fail: str = "") -> None:
        def status(function: str) -> int:
            return 100 if function == fail else 0

        def get(device: Any, index: int) -> int:
            device[0] = 7
            return 101 if index else status("cuDeviceGet")

        def get_name(target: Any, size: int, device: int) -> int:
            assert (size, device) == (256, 7)
            ctypes.memmove(target, name + b"\0", len(name) + 1)
            return status("cuDeviceGetName")

        def total(target: Any, device: int) -> int:
            assert device == 7
            target[0] = 80 * GIB
            return status("cuDeviceTotalMem_v2")

        def get_uuid(target: Any, device: int) -> int:
            assert device == 7
            ctypes.memmove(target, UUID.bytes, 16)
            return status("cuDeviceGetUuid_v2")

        integer, pointer = ctypes.c_int, ctypes.c_void_p

        def c(function: Any, *kinds: Any) -> Any:
            return ctypes.CFUNCTYPE(integer, *kinds)(function)

        self.cuInit = c(lambda flags: status("cuInit"), ctypes.c_uint)
        self.cuDeviceGet = c(get, ctypes.POINTER(integer), integer)
        self.cuDeviceGetName = c(get_name, pointer, integer, integer)
        self.cuDeviceTotalMem_v2 = c(total, ctypes.POINTER(ctypes.c_size_t), integer)
        self.cuDeviceGetUuid_v2 = c(get_uuid, pointer, integer)


def test_the_driver_is_asked_for_name_memory_and_uuid() -> None:
    assert read_gpu(0, StandInDriver()) == GpuFacts(
        "NVIDIA H100 80GB HBM3", f"GPU-{UUID}", 80 * GIB
    )


def test_a_slice_of_mig_has_a_uuid_of_its_own_kind() -> None:
    facts = read_gpu(0, StandInDriver(b"NVIDIA A100-SXM4-40GB MIG 1g.5gb"))
    assert facts.uuid == f"MIG-{UUID}"


FUNCTIONS: Sequence[str] = (
    *("cuInit", "cuDeviceGet", "cuDeviceGetName"),
    *("cuDeviceTotalMem_v2", "cuDeviceGetUuid_v2"),
)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_each_error_of_the_driver_is_told(function: str) -> None:
    with pytest.raises(LoadFailed, match=rf"answered {function} with error 100\. .*device: cpu"):
        read_gpu(0, StandInDriver(fail=function))


def test_a_gpu_that_is_not_there() -> None:
    with pytest.raises(LoadFailed, match="cuDeviceGet with error 101"):
        read_gpu(1, StandInDriver())


def test_a_machine_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(LoadFailed, match=r"no NVIDIA driver \(libcuda\.so\.1: .*device: cpu"):
        read_gpu(0)
