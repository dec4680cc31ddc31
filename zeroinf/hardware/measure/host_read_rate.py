"""Measures how fast processors read host memory, which bounds attention on the CPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from zeroinf.hardware.cgroup import read_cgroup_processors
from zeroinf.hardware.host_library import ThreadPool
from zeroinf.hardware.mapped_memory import map_memory
from zeroinf.hardware.measure.link_traffic import busy_link
from zeroinf.hardware.numa import own_processors
from zeroinf.hardware.processors import attention_processors

_ROUNDS = 5
_BYTES = 1 << 30
_BESIDE_S = 0.3


def measure_host_read(*, nbytes: int = _BYTES) -> float:
    """`nbytes` read by the processors that attend for a process that has the node to itself, the best of five rounds,
    in GB/s. Raises EnvironmentProblem where the code that reads cannot be compiled."""
    with _reader(nbytes) as rounds:
        return nbytes / min(rounds()) / 1e9


@dataclass(frozen=True)
class BesideLink:
    """Rates of processors that read host memory and of a link that copies from there meanwhile, in GB/s."""

    read_gbps: float
    link_gbps: float
    link_alone_gbps: float
    """The link's before, with nothing beside it."""


def measure_read_beside_link(device: int, *, nbytes: int = _BYTES) -> BesideLink:
    """The same while copies fill the link of the GPU `device`: the median of the rounds. Raises EnvironmentProblem
    where the driver refuses, too."""
    with _reader(nbytes) as rounds, busy_link(device) as traffic:
        before, start = traffic.copied_bytes, time.perf_counter()
        times = list[float]()
        while time.perf_counter() - start < _BESIDE_S:  # many copies
            times += rounds()
        copied, seconds = traffic.copied_bytes - before, time.perf_counter() - start
    read = nbytes / sorted(times)[len(times) // 2] / 1e9
    return BesideLink(read, min(copied / seconds / 1e9, traffic.alone_gbps), traffic.alone_gbps)


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
