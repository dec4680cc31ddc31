"""Copies inside host memory."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

_THREADS = 8
_ROUNDS = 5


def measure_host_copy(*, nbytes: int = 512 << 20) -> float:
    """`nbytes` copied from memory to memory by 8 threads, the best of five rounds, in GB/s of bytes copied."""
    source = np.ones((_THREADS, nbytes // _THREADS), dtype=np.uint8)
    target = np.ones_like(source)  # written once, so that its pages are there

    def one_round(pool: ThreadPoolExecutor) -> float:
        started = time.perf_counter()
        list(pool.map(np.copyto, target, source))
        return time.perf_counter() - started

    with ThreadPoolExecutor(_THREADS) as pool:
        return source.nbytes / min(one_round(pool) for _ in range(_ROUNDS)) / 1e9
