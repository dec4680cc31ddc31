"""Measures the links that feed the GPUs, and the rate of page-locking host memory."""

from __future__ import annotations

import time
from collections.abc import Sequence

from zeroinf.errors import EnvironmentProblem
from zeroinf.hardware.mapped_memory import map_memory

# More than any processor caches.
_COPY_BYTES = 1 << 30
_BRIEF_BYTES = 256 << 20
_COPIES = 10
_BRIEF_ROUNDS = 5
_LOCKED_BYTES = 2 << 30
_PORTABLE = 1  # cudaHostRegisterPortable


def measure_links(devices: Sequence[int]) -> float:
    """Page-locked host memory to the GPUs `devices` at once: bytes of all by the time of the slowest, in GB/s."""
    import torch

    hosts = [torch.empty(_COPY_BYTES, dtype=torch.uint8, pin_memory=True).fill_(1) for _ in devices]
    targets = [torch.empty(_COPY_BYTES, dtype=torch.uint8, device=f"cuda:{device}") for device in devices]

    def copy(times: int) -> float:
        started = time.perf_counter()
        for _ in range(times):
            for host, target in zip(hosts, targets, strict=True):
                target.copy_(host, non_blocking=True)
        for device in devices:
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    copy(1)  # the first copy sets the driver up
    return len(devices) * _COPIES * _COPY_BYTES / copy(_COPIES) / 1e9


def measure_own_link(device: int) -> float:
    """The rate of copies from page-locked host memory to one GPU, in GB/s. A run calls it before it loads.

    It is brief and takes little memory. The result is the best of several rounds: single rounds were up to 5 % below
    what the run then reached (docs/benchmarks-archive.md).
    """
    import torch

    host = torch.empty(_BRIEF_BYTES, dtype=torch.uint8, pin_memory=True).fill_(1)
    target = torch.empty(_BRIEF_BYTES, dtype=torch.uint8, device=f"cuda:{device}")
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    rounds_ms = []
    for _ in range(1 + _BRIEF_ROUNDS):
        begin.record()
        for _ in range(_COPIES):
            target.copy_(host, non_blocking=True)
        end.record()
        end.synchronize()
        rounds_ms.append(begin.elapsed_time(end))
    del target
    torch.cuda.empty_cache()
    fastest_ms: float = min(rounds_ms[1:])  # the first copies set the driver up
    return _COPIES * _BRIEF_BYTES / fastest_ms / 1e6


def measure_page_lock(*, shared: bool = False) -> float:
    """cudaHostRegister on memory that has just been written, as the weights' own is made, in GB/s. The memory is
    private, or such that several ranks could share it.

    Raises EnvironmentProblem where CUDA refuses, as it does under a small memlock limit.
    """
    import torch

    torch.cuda.init()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    memory = torch.frombuffer(map_memory(_LOCKED_BYTES, shared=shared), dtype=torch.uint8).fill_(1)
    address = memory.data_ptr()
    started = time.perf_counter()
    error = cudart.cudaHostRegister(address, _LOCKED_BYTES, _PORTABLE)
    elapsed_s = time.perf_counter() - started
    if int(error):
        raise EnvironmentProblem(
            f"cannot page-lock {_LOCKED_BYTES >> 30} GiB of host memory: CUDA error {int(error)}",
            hint="raise the memlock limit (`ulimit -l unlimited`) or free host memory",
        )
    cudart.cudaHostUnregister(address)
    return _LOCKED_BYTES / elapsed_s / 1e9
