"""GPUs through a fake NVML."""

from __future__ import annotations

import os
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from zeroinf.errors import EnvironmentProblem
from zeroinf.hardware.gpus import (
    read_bus_id,
    read_cuda_memory,
    read_driver,
    read_gpus,
    read_used_bytes,
    visible_indices,
)

GIB = 1 << 30
UUIDS = ("GPU-aaaa-1", "GPU-aabb-2", "GPU-cccc-3")


class NVMLError(Exception):
    pass


class FakeNvml(ModuleType):
    """Three GPUs of 80 GiB; GPU i has i GiB in use, half a GiB of it by this process. Handles are indices."""

    nvmlMemory_v2 = 2  # noqa: N815 - NVML's name
    NVMLError = NVMLError

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.sessions = 0

    def nvmlInit(self) -> None:  # noqa: N802
        self.sessions += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.sessions -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(UUIDS)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:  # noqa: N802
        if uuid not in (*UUIDS, "MIG-slice"):
            raise NVMLError("not found")
        return 1 if uuid == "MIG-slice" else UUIDS.index(uuid)

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        return "570.1"

    def nvmlDeviceGetUUID(self, handle: int) -> str:  # noqa: N802
        return UUIDS[handle]

    def nvmlDeviceGetPciInfo(self, handle: int) -> Any:  # noqa: N802
        bus = f"0000000{handle}:1B:00.0"
        return SimpleNamespace(busId=bus.encode() if handle else bus)

    def nvmlDeviceGetName(self, handle: int) -> str:  # noqa: N802
        return f"Fake {handle}"

    def nvmlDeviceGetMemoryInfo(self, handle: int, version: int | None = None) -> Any:  # noqa: N802
        return SimpleNamespace(total=80 * GIB, free=(80 - handle) * GIB, used=handle * GIB)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[Any]:  # noqa: N802
        mine = SimpleNamespace(pid=os.getpid(), usedGpuMemory=GIB // 2)
        return [mine, SimpleNamespace(pid=1, usedGpuMemory=None)]

    def nvmlDeviceGetMaxPcieLinkGeneration(self, handle: int) -> int:  # noqa: N802
        return 5

    def nvmlDeviceGetCurrPcieLinkWidth(self, handle: int) -> int:  # noqa: N802
        if handle == 1:
            raise NVMLError("not supported")
        return 16

    def nvmlDeviceGetCudaComputeCapability(self, handle: int) -> tuple[int, int]:  # noqa: N802
        return (9, 0)


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


def test_every_gpu_is_read_and_the_session_closed(nvml: FakeNvml) -> None:
    gpus = read_gpus()
    assert [gpu.name for gpu in gpus] == ["Fake 0", "Fake 1", "Fake 2"]
    assert (gpus[2].total_bytes, gpus[2].free_bytes) == (80 * GIB, 78 * GIB)
    assert (gpus[2].pcie_generation, gpus[2].pcie_width, gpus[2].capability) == (5, 16, (9, 0))
    assert [gpu.uuid for gpu in gpus] == list(UUIDS)
    assert read_driver() == "570.1"
    assert nvml.sessions == 0


@pytest.mark.usefixtures("nvml")
def test_memory_in_use_is_read_by_uuid_and_an_unknown_one_is_told() -> None:
    assert read_used_bytes(UUIDS[2]) == 2 * GIB
    with pytest.raises(EnvironmentProblem, match="GPU-none"):
        read_used_bytes("GPU-none")


@pytest.mark.usefixtures("nvml")
def test_memory_of_this_process_is_not_held_by_others() -> None:
    assert [gpu.other_bytes for gpu in read_gpus()] == [0, GIB // 2, 3 * GIB // 2]


@pytest.mark.usefixtures("nvml")
def test_what_the_driver_does_not_tell_is_none() -> None:
    assert read_gpus()[1].pcie_width is None


def test_driver_without_the_newer_memory_query_is_read_all_the_same(nvml: FakeNvml) -> None:
    newer = nvml.nvmlDeviceGetMemoryInfo

    def older(handle: int, version: int | None = None) -> Any:
        if version is not None:
            raise NVMLError("function not found")
        return newer(handle)

    nvml.nvmlDeviceGetMemoryInfo = older  # type: ignore[method-assign]
    assert read_gpus()[0].total_bytes == 80 * GIB


@pytest.mark.usefixtures("nvml")
def test_environment_chooses_and_orders_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-aaaa")
    assert [(gpu.index, gpu.name) for gpu in read_gpus()] == [(0, "Fake 2"), (1, "Fake 0")]


@pytest.mark.usefixtures("nvml")
def test_mig_slice_is_the_one_gpu_seen() -> None:
    assert [gpu.name for gpu in read_gpus("MIG-slice")] == ["Fake 1"]
    assert read_gpus("MIG-unknown") == ()


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("0,1,2", [0, 1, 2]),
        ("2, 0", [2, 0]),
        ("", []),
        ("-1", []),
        ("1,-1,0", [1]),
        ("0,9,1", [0]),
        ("NoDevFiles", []),
        ("GPU-cccc-3", [2]),
        ("GPU-aab", [1]),
        ("GPU-aa", []),
        ("1,1", []),
        ("0,GPU-aaaa", []),
    ],
)
def test_cuda_visible_devices_is_read_as_cuda_reads_it(setting: str, expected: list[int]) -> None:
    assert visible_indices(setting, UUIDS) == expected


def test_machine_without_a_driver_has_no_gpus(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise NVMLError("shared library not found")

    assert len(read_gpus()) == 3
    monkeypatch.setattr(nvml, "nvmlInit", missing)
    assert read_gpus() == ()


def test_machine_without_the_nvml_package_has_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert read_gpus() == ()
    assert read_driver() is None


def test_memory_that_nvml_does_not_report_is_cudas_and_is_the_hosts(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(handle: int, version: int | None = None) -> Any:
        raise NVMLError("not supported")

    nvml.nvmlDeviceGetMemoryInfo = unsupported  # type: ignore[method-assign]
    monkeypatch.setattr("zeroinf.hardware.gpus.read_cuda_memory", lambda index: (121 * GIB, index == 0))
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=128 * GIB, available=110 * GIB))
    unified, own = read_gpus()[:2]
    assert (unified.total_bytes, unified.free_bytes, unified.is_unified) == (121 * GIB, 110 * GIB, True)
    assert (own.total_bytes, own.free_bytes, own.is_unified) == (121 * GIB, 121 * GIB, False)


def test_a_chip_without_memory_of_its_own_is_known_by_its_name(nvml: FakeNvml) -> None:
    nvml.nvmlDeviceGetName = lambda handle: "NVIDIA GB10" if handle else "NVIDIA GH200 480GB"  # type: ignore[method-assign]
    assert [gpu.is_unified for gpu in read_gpus()] == [False, True, True]


def test_without_a_cuda_driver_cuda_tells_nothing() -> None:
    assert read_cuda_memory(0, "no-such-library.so") is None
    assert read_cuda_memory(0, "libc.so.6") is None, "a library of another kind"


@pytest.mark.usefixtures("nvml")
def test_a_gpu_is_found_on_the_bus_as_the_kernel_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [read_bus_id(index) for index in range(4)] == ["0000:1b:00.0", "0001:1b:00.0", "0002:1b:00.0", None]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    assert [read_bus_id(index) for index in range(2)] == ["0002:1b:00.0", None]
