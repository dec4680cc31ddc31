"""Filling host memory."""

from __future__ import annotations

import mmap
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np

_THREADS = 8
_ROUNDS = 5


def measure_host_copy(*, nbytes: int = 512 << 20) -> tuple[float, float]:
    """`nbytes` copied by 8 threads into shared memory that nobody has touched, and once more into the same, each the
    best of five rounds, in GB/s."""
    source = np.ones((_THREADS, nbytes // _THREADS), dtype=np.uint8)

    def one_round(pool: ThreadPoolExecutor) -> tuple[float, float]:
        memory = mmap.mmap(-1, source.nbytes)
        with suppress(OSError):  # a kernel without transparent huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
        target = np.frombuffer(memory, dtype=np.uint8).reshape(source.shape)
        times = [time.perf_counter()]
        for _ in range(2):
            list(pool.map(np.copyto, target, source))
            times.append(time.perf_counter())
        return times[1] - times[0], times[2] - times[1]

    with ThreadPoolExecutor(_THREADS) as pool:
        first, again = zip(*(one_round(pool) for _ in range(_ROUNDS)), strict=True)
    return source.nbytes / min(first) / 1e9, source.nbytes / min(again) / 1e9
