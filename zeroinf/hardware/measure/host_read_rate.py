"""Measures how fast processors read host memory, which bounds attention on the CPU."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread

import numpy as np

from zeroinf.hardware.cgroup import read_cgroup_processors
from zeroinf.hardware.host_library import ThreadPool
from zeroinf.hardware.mapped_memory import map_memory
from zeroinf.hardware.processors import attention_processors, own_processors

_ROUNDS = 5
_COPIED_BYTES = 256 << 20


def measure_host_read(*, nbytes: int = 1 << 30, beside_link_of: int | None = None) -> float:
    """`nbytes` read by the processors that attend for a process that has the node to itself, the best of five rounds,
    in GB/s; the median, while copies of page-locked memory to the GPU `beside_link_of` fill its link. Raises
    EnvironmentProblem where the code that reads cannot be compiled."""
    pool = ThreadPool(attention_processors(0, [own_processors()], read_cgroup_processors()))
    try:
        memory = np.frombuffer(map_memory(nbytes), dtype=np.uint8)
        pool.clear(memory.ctypes.data, nbytes)
        if beside_link_of is None:
            return nbytes / min(_rounds(pool, memory)) / 1e9
        with _copying(beside_link_of):
            return nbytes / sorted(_rounds(pool, memory))[_ROUNDS // 2] / 1e9
    finally:
        pool.close()


def _rounds(pool: ThreadPool, memory: np.ndarray) -> list[float]:
    times = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        pool.read(memory.ctypes.data, memory.nbytes)
        times.append(time.perf_counter() - start)
    return times


@contextmanager
def _copying(device: int) -> Iterator[None]:
    """While it lasts, copies follow each other over the link."""
    import torch

    host = torch.empty(_COPIED_BYTES, dtype=torch.uint8, pin_memory=True).fill_(1)
    target = torch.empty(_COPIED_BYTES, dtype=torch.uint8, device=f"cuda:{device}")
    ends = Event()

    def copy() -> None:
        while not ends.is_set():
            for _ in range(4):  # the link has the next ones while this thread waits
                target.copy_(host, non_blocking=True)
            torch.cuda.synchronize(device)

    thread = Thread(target=copy, name="copies")
    thread.start()
    try:
        yield
    finally:
        ends.set()
        thread.join()
