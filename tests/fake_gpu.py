"""A GPU that is not there: what torch and NVML would say of its memory, and the machine that a plan would find."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from zeroinf.compat import allocator
from zeroinf.hardware.machine import Gpu, Machine, Memory
from zeroinf.hardware.rates import Rates
from zeroinf.options import planning
from zeroinf.service import gpu_memory

GIB = 1 << 30


def gpu_of(total_bytes: int = 80 * GIB, free_bytes: int = 70 * GIB) -> Gpu:
    """A Hopper card of which somebody may hold a part."""
    return Gpu(
        index=0,
        name="NVIDIA H100",
        total_bytes=total_bytes,
        free_bytes=free_bytes,
        other_bytes=total_bytes - free_bytes,
        pcie_generation=5,
        pcie_width=16,
        capability=(9, 0),
        uuid="GPU-0",
    )


def machine_of(*gpus: Gpu, host_bytes: int = 64 * GIB) -> Machine:
    """A machine without a disk, whose host memory is all free."""
    memory = Memory(
        total_bytes=host_bytes,
        available_bytes=host_bytes,
        cgroup_limit_bytes=None,
        swap_bytes=0,
        shared_memory_bytes=host_bytes,
        memlock_bytes=None,
        numa_nodes=1,
    )
    return Machine(gpus=gpus, memory=memory, disks=(), cores=8)


class FakeGpu:
    """Device 0 of torch and of NVML: memory that this process and its neighbours hold, as a test sets it."""

    def __init__(self, total_bytes: int = 80 * GIB) -> None:
        self.total = total_bytes
        self.neighbours = self.context = self.reserved = self.allocated = 0
        self.most_reserved = self.most_allocated = 0
        self.limits: list[float] = []
        """What set_per_process_memory_fraction was told."""
        self.settings: list[str] = []
        """What torch's allocator was told."""
        self.nvml = True
        """Whether NVML says how much is in use."""

    @property
    def limit(self) -> float | None:
        """The part of the memory that torch may take now."""
        return self.limits[-1] if self.limits else None

    @property
    def used(self) -> int:
        return self.neighbours + self.context + self.reserved

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let torch, NVML and the planner find this GPU until the test is over."""
        answers = {
            "set_device": lambda device: None,
            "set_per_process_memory_fraction": lambda fraction, device: self.limits.append(fraction),
            "get_device_properties": lambda device: SimpleNamespace(total_memory=self.total),
            "memory_allocated": lambda device: self.allocated,
            "memory_reserved": lambda device: self.reserved,
            "max_memory_allocated": lambda device: self.most_allocated,
            "max_memory_reserved": lambda device: self.most_reserved,
            "reset_peak_memory_stats": lambda device: setattr(self, "most_allocated", self.allocated),
            "mem_get_info": lambda device: (self.total - self.used, self.total),
        }
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, answer)
        gpu = gpu_of(self.total)
        monkeypatch.setattr(allocator, "set_allocator", self.settings.append)
        monkeypatch.setattr(allocator, "_users", 0)
        monkeypatch.setattr(gpu_memory, "_mapped", lambda device: self.reserved)
        monkeypatch.setattr(gpu_memory, "_taken", self._take)
        monkeypatch.setattr(gpu_memory, "read_gpus", lambda: (gpu,) if self.nvml else ())
        monkeypatch.setattr(gpu_memory, "read_used_bytes", lambda uuid: self.used)
        monkeypatch.setattr(gpu_memory, "_start_libraries", lambda plan, device: None)  # matrix products on the GPU
        monkeypatch.setattr(planning, "read_machine", lambda paths: self.machine())
        monkeypatch.setattr(planning, "read_profile", lambda machine: Rates())

    def _take(self, nbytes: int, device: torch.device) -> None:
        """What torch keeps when it is free again."""
        if nbytes > self.total - self.used:
            raise torch.OutOfMemoryError("out of memory")
        self.reserved += nbytes
        self.most_allocated = max(self.most_allocated, self.allocated + nbytes)

    def machine(self) -> Machine:
        """What a snapshot taken now would say."""
        return machine_of(gpu_of(self.total, self.total - self.used))
