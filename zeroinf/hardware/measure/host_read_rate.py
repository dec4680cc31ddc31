"""Measures how fast processors read host memory, which bounds attention on the CPU."""

from __future__ import annotations

import time

import numpy as np

from zeroinf.hardware.host_library import ThreadPool
from zeroinf.hardware.mapped_memory import map_memory
from zeroinf.hardware.processors import attention_processors

_ROUNDS = 5


def measure_host_read(*, nbytes: int = 1 << 30) -> float:
    """`nbytes` read by the processors that attend for a process that has the node to itself, the best of five rounds,
    in GB/s. Raises EnvironmentProblem where the code that reads cannot be compiled."""
    pool = ThreadPool(attention_processors(0, 1))
    try:
        memory = np.frombuffer(map_memory(nbytes), dtype=np.uint8)
        pool.clear(memory.ctypes.data, nbytes)
        times = []
        for _ in range(_ROUNDS):
            start = time.perf_counter()
            pool.read(memory.ctypes.data, nbytes)
            times.append(time.perf_counter() - start)
    finally:
        pool.close()
    return nbytes / min(times) / 1e9
