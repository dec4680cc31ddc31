"""Reads the GPUs through NVML. No CUDA context is made, so it takes no GPU memory."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from itertools import permutations
from types import SimpleNamespace
from typing import Any, TypeVar

import psutil

from zeroinf.errors import EnvironmentProblem
from zeroinf.hardware.machine import Gpu

_Answer = TypeVar("_Answer")

# CU_DEVICE_ATTRIBUTE_INTEGRATED in cuda.h.
_CUDA_INTEGRATED = 18
# Chips whose GPU has no memory of its own, by what NVML calls them; some releases of the driver report the host's.
_UNIFIED = ("GB10", "Thor", "Orin", "Xavier", "Tegra", "nvgpu")

# NVML_P2P_CAPS_INDEX_READ in nvml.h; nvidia-ml-py has a tuple under that name, which NVML refuses.
_P2P_READ = 0


def read_gpus(visible: str | None = None) -> tuple[Gpu, ...]:
    """The GPUs that a CUDA program started now would see, in its order; none where driver or library is missing.

    `visible` is a value of CUDA_VISIBLE_DEVICES (indices, UUIDs or beginnings of UUIDs, MIG UUIDs); None takes the
    environment's. Indices follow the PCI bus, which is CUDA's own order on machines whose GPUs are all alike.
    """
    setting = os.environ.get("CUDA_VISIBLE_DEVICES") if visible is None else visible

    def read(nvml: Any) -> tuple[Gpu, ...]:
        return tuple(_read_gpu(nvml, index, handle) for index, handle in enumerate(_visible_handles(nvml, setting)))

    return _ask_nvml(read) or ()


def read_driver() -> str | None:
    """The version of the NVIDIA driver; None where driver or library is missing."""
    return _ask_nvml(lambda nvml: str(nvml.nvmlSystemGetDriverVersion()))


def read_bus_id(index: int) -> str | None:
    """The place of the visible GPU `index` on the PCI bus, as /sys/bus/pci names it: 0000:1b:00.0. None where NVML does
    not tell."""

    def ask(nvml: Any) -> str | None:
        handles = _visible_handles(nvml, os.environ.get("CUDA_VISIBLE_DEVICES"))
        if index >= len(handles):
            return None
        found = nvml.nvmlDeviceGetPciInfo(handles[index]).busId
        domain, _, rest = (found.decode() if isinstance(found, bytes) else str(found)).partition(":")
        return f"{int(domain, 16):04x}:{rest.lower()}"

    return _ask_nvml(ask)


def read_used_bytes(uuid: str) -> int:
    """Bytes that all processes together hold of the GPU with that UUID now, without the driver's own reserve.

    Raises EnvironmentProblem where NVML does not tell.
    """
    used = _ask_nvml(lambda nvml: _memory_info(nvml, nvml.nvmlDeviceGetHandleByUUID(uuid)).used)
    if used is None:
        raise EnvironmentProblem(f"NVML does not say how much memory of GPU {uuid} is in use", hint="see nvidia-smi")
    return int(used)


def gpus_are_linked(count: int) -> bool:
    """Whether each of the first `count` visible GPUs can read the memory of every other one directly."""

    def ask(nvml: Any) -> bool:
        handles = _visible_handles(nvml, os.environ.get("CUDA_VISIBLE_DEVICES"))[:count]
        return all(
            nvml.nvmlDeviceGetP2PStatus(one, other, _P2P_READ) == nvml.NVML_P2P_STATUS_OK
            for one, other in permutations(handles, 2)
        )

    return bool(_ask_nvml(ask))


def _ask_nvml(question: Callable[[Any], _Answer]) -> _Answer | None:
    """The answer to one question in an NVML session of its own; None without package or driver, or if it refuses."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except ImportError:
        return None
    except pynvml.NVMLError:  # no driver, or one that does not answer
        return None
    try:
        return question(pynvml)
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def visible_indices(setting: str, uuids: Sequence[str]) -> list[int]:
    """Indices of the GPUs `uuids` that a CUDA_VISIBLE_DEVICES of `setting` leaves visible.

    CUDA's rules (CUDA C++ Programming Guide, "CUDA Environment Variables"): the list ends at the first entry that
    names no GPU, and one that names a GPU twice leaves none.
    """
    chosen: list[int] = []
    for entry in (part.strip() for part in setting.split(",")):
        if entry.isdigit():
            named = [int(entry)] if int(entry) < len(uuids) else []
        else:
            named = [index for index, uuid in enumerate(uuids) if entry.startswith("GPU-") and uuid.startswith(entry)]
        if len(named) != 1:
            break
        if named[0] in chosen:
            return []
        chosen.append(named[0])
    return chosen


def _visible_handles(nvml: Any, setting: str | None) -> list[Any]:
    handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    if setting is None:
        return handles
    if setting.startswith("MIG-"):
        # A CUDA program uses one slice of a partitioned GPU, the first in the list.
        return [nvml.nvmlDeviceGetHandleByUUID(setting.split(",")[0].strip())]
    uuids = [nvml.nvmlDeviceGetUUID(handle) for handle in handles]
    return [handles[index] for index in visible_indices(setting, uuids)]


def _memory_info(nvml: Any, handle: Any) -> Any:
    # The second version leaves the driver's own reserve out of `used`; older drivers know the first only.
    for version in ((nvml.nvmlMemory_v2,), ()):
        try:
            return nvml.nvmlDeviceGetMemoryInfo(handle, *version)
        except nvml.NVMLError:
            continue
    return None


def _read_gpu(nvml: Any, index: int, handle: Any) -> Gpu:
    def ask(question: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return question(handle, *arguments)
        except nvml.NVMLError:
            return None

    memory = _memory_info(nvml, handle)
    name = str(ask(nvml.nvmlDeviceGetName) or "unknown")
    is_unified = any(mark in name for mark in _UNIFIED)
    if memory is None and (found := read_cuda_memory(index)) is not None:
        total, is_unified = found
        free = min(total, psutil.virtual_memory().available) if is_unified else total
        memory = SimpleNamespace(total=total, free=free, used=0)
    processes = ask(nvml.nvmlDeviceGetComputeRunningProcesses) or []
    own_bytes = sum(process.usedGpuMemory or 0 for process in processes if process.pid == os.getpid())
    return Gpu(
        index=index,
        name=name,
        total_bytes=memory.total if memory else 0,
        free_bytes=memory.free if memory else 0,
        other_bytes=max(0, memory.used - own_bytes) if memory else 0,
        pcie_generation=ask(nvml.nvmlDeviceGetMaxPcieLinkGeneration),
        pcie_width=ask(nvml.nvmlDeviceGetCurrPcieLinkWidth),
        capability=ask(nvml.nvmlDeviceGetCudaComputeCapability),
        uuid=ask(nvml.nvmlDeviceGetUUID),
        is_unified=is_unified,
    )


def read_cuda_memory(index: int, library: str = "libcuda.so.1") -> tuple[int, bool] | None:
    """Bytes of the visible GPU `index` as the CUDA driver has them, and whether they are the host's; None where it does
    not tell. For GPUs of which NVML reports no memory, as GB10; makes no context.
    """
    total, is_integrated, device = ctypes.c_size_t(), ctypes.c_int(), ctypes.c_int()
    try:
        cuda = ctypes.CDLL(library)
        failed = (
            cuda.cuInit(0)
            or cuda.cuDeviceGet(ctypes.byref(device), index)
            or cuda.cuDeviceTotalMem_v2(ctypes.byref(total), device)
            or cuda.cuDeviceGetAttribute(ctypes.byref(is_integrated), _CUDA_INTEGRATED, device)
        )
    except (OSError, AttributeError):
        return None
    return None if failed else (total.value, bool(is_integrated.value))
