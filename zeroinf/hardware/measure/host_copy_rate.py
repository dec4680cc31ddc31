"""Measures how fast host memory is filled, both new memory and memory that was used before."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from zeroinf.hardware.mapped_memory import map_memory

_THREADS = 8
_ROUNDS = 5


def measure_host_copy(*, shared: bool = False, nbytes: int = 512 << 20) -> tuple[float, float]:
    """`nbytes` copied by 8 threads into memory that nobody has touched, and once more into the same, each the best of
    five rounds, in GB/s. The memory is private, or such that several ranks could share it."""
    source = np.ones((_THREADS, nbytes // _THREADS), dtype=np.uint8)

    def one_round(pool: ThreadPoolExecutor) -> tuple[float, float]:
        target = np.frombuffer(map_memory(source.nbytes, shared=shared), dtype=np.uint8).reshape(source.shape)
        times = [time.perf_counter()]
        for _ in range(2):
            list(pool.map(np.copyto, target, source))
            times.append(time.perf_counter())
        return times[1] - times[0], times[2] - times[1]

    with ThreadPoolExecutor(_THREADS) as pool:
        first, again = zip(*(one_round(pool) for _ in range(_ROUNDS)), strict=True)
    return source.nbytes / min(first) / 1e9, source.nbytes / min(again) / 1e9
