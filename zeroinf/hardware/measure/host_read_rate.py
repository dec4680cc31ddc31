"""Measures how fast processors read host memory, which bounds attention on the CPU."""

from __future__ import annotations

import time

import numpy as np

from zeroinf.hardware.host_library import ThreadPool, attention_threads

_ROUNDS = 5


def measure_host_read(*, nbytes: int = 1 << 30) -> float:
    """`nbytes` read by as many threads as attend for a process that has the node to itself, the best of five rounds, in
    GB/s. Raises EnvironmentProblem where the code that reads cannot be compiled."""
    pool = ThreadPool(attention_threads(1))
    try:
        memory = np.ones(nbytes, dtype=np.uint8)
        times = []
        for _ in range(_ROUNDS):
            start = time.perf_counter()
            pool.read(memory.ctypes.data, nbytes)
            times.append(time.perf_counter() - start)
    finally:
        pool.close()
    return nbytes / min(times) / 1e9
