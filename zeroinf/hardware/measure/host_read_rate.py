"""Measures how fast processors read host memory, which bounds attention on the CPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from zeroinf.hardware.cgroup import read_cgroup_processors
from zeroinf.hardware.host_library import ThreadPool
from zeroinf.hardware.mapped_memory import map_memory
from zeroinf.hardware.measure.link_traffic import busy_link
from zeroinf.hardware.numa import own_processors
from zeroinf.hardware.processors import attention_processors

_ROUNDS = 5
_BYTES = 1 << 30


def measure_host_read(*, nbytes: int = _BYTES) -> float:
    """`nbytes` read by the processors that attend for a process that has the node to itself, the best of five rounds,
    in GB/s. Raises EnvironmentProblem where the code that reads cannot be compiled."""
    with _reader(nbytes) as rounds:
        return nbytes / min(rounds()) / 1e9


def measure_read_beside_link(device: int, *, nbytes: int = _BYTES) -> tuple[float, float]:
    """The same while copies fill the link of the GPU `device`, the median of the rounds, and the rate of that link by
    itself before. Raises EnvironmentProblem where the driver refuses, too."""
    with _reader(nbytes) as rounds, busy_link(device) as link_gbps:
        return nbytes / sorted(rounds())[_ROUNDS // 2] / 1e9, link_gbps


@contextmanager
def _reader(nbytes: int) -> Iterator[Callable[[], list[float]]]:
    """A function that reads so much memory again and again, and returns the seconds of each round."""
    pool = ThreadPool(attention_processors(0, [own_processors()], read_cgroup_processors()))
    try:
        memory = np.frombuffer(map_memory(nbytes), dtype=np.uint8)
        pool.clear(memory.ctypes.data, nbytes)
        yield lambda: [_seconds(pool, memory) for _ in range(_ROUNDS)]
    finally:
        pool.close()


def _seconds(pool: ThreadPool, memory: np.ndarray) -> float:
    start = time.perf_counter()
    pool.read(memory.ctypes.data, memory.nbytes)
    return time.perf_counter() - start
