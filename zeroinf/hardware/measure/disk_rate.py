"""Measures a disk's read rate with O_DIRECT, by the number of requests in flight, and how many single pages it reads a
second."""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from zeroinf.hardware.disk import PAGE_READERS

REQUESTS_IN_FLIGHT = (1, 2, 4, 8, 16, 32)

_REQUEST_BYTES = 4 << 20
_PAGES_AT_ONCE = 64
_PAGES_FILE_BYTES = 1 << 30
# More than a drive keeps in memory of its own.
_FILE_BYTES = 4 << 30


def measure_disk(
    folder: Path, *, file_bytes: int = _FILE_BYTES, write_limit_s: float = 10.0, read_s: float = 1.0
) -> dict[int, float]:
    """O_DIRECT reads of 4 MiB in GB/s, by the number of threads that keep one request each in flight.

    They read as `disk_readings` says, each number of threads for `read_s`.

    Raises OSError where the file system is full or has no O_DIRECT.
    """
    with disk_readings(folder, file_bytes=file_bytes, write_limit_s=write_limit_s) as read_gbps:
        return {threads: read_gbps(threads, read_s) for threads in REQUESTS_IN_FLIGHT}


@contextmanager
def disk_readings(
    folder: Path, *, file_bytes: int = _FILE_BYTES, write_limit_s: float = 10.0
) -> Iterator[Callable[[int, float], float]]:
    """A function of threads and seconds that reads so and answers GB/s, each thread with one request in flight.

    They read a file without a name, written for it: it is gone with this process, however that ends. It has
    `file_bytes`, or what could be written in `write_limit_s`, or a quarter of the free space, if that is less.

    Raises OSError where the file system is full or has no O_DIRECT.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        descriptor = os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDWR | os.O_DIRECT)
        try:
            size_bytes = min(file_bytes, shutil.disk_usage(folder).free // 4)
            requests = _write(descriptor, size_bytes, write_limit_s)
            yield partial(_read_gbps, descriptor, requests)
        finally:
            os.close(descriptor)


def measure_page_reads(folder: Path, *, file_bytes: int = _PAGES_FILE_BYTES, most_s: float = 2.0) -> float:
    """Pages a second of a mapped file that threads read at any place, as rows of tables are read.

    Each page is read once, for `most_s` at the most. Raises OSError where the file system is full.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        size_bytes = min(file_bytes, shutil.disk_usage(folder).free // 4)
        nbytes = _write(file.fileno(), size_bytes, 10.0) * _REQUEST_BYTES
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        memory = mmap.mmap(file.fileno(), nbytes, access=mmap.ACCESS_READ)
        memory.madvise(mmap.MADV_RANDOM)
        pages = np.frombuffer(memory, np.uint8).reshape(-1, mmap.PAGESIZE)
        started = time.perf_counter()

        def read(share: np.ndarray[Any, Any]) -> int:
            done, copied = 0, np.empty((_PAGES_AT_ONCE, mmap.PAGESIZE), np.uint8)
            while done < len(share) and (done == 0 or time.perf_counter() - started < most_s):
                some = share[done : done + _PAGES_AT_ONCE]
                np.take(pages, some, 0, copied[: len(some)], mode="clip")
                done += len(some)
            return done

        with ThreadPoolExecutor(PAGE_READERS) as pool:
            order = np.random.default_rng(0).permutation(len(pages))
            count = sum(pool.map(read, np.array_split(order, PAGE_READERS)))
        return count / (time.perf_counter() - started)


def _write(descriptor: int, file_bytes: int, limit_s: float) -> int:
    """Fill the file with blocks that are random, and all different; returns their number."""
    deadline = time.perf_counter() + limit_s
    with mmap.mmap(-1, _REQUEST_BYTES) as block:
        block[:] = os.urandom(_REQUEST_BYTES)
        for index in range(max(1, file_bytes // _REQUEST_BYTES)):
            block[:8] = index.to_bytes(8, "little")
            os.pwrite(descriptor, block, index * _REQUEST_BYTES)
            if time.perf_counter() > deadline:
                break
    os.fsync(descriptor)
    return index + 1


def _read_gbps(descriptor: int, requests: int, threads: int, seconds: float) -> float:
    order, lock = count(), threading.Lock()
    started = time.perf_counter()

    def read_on(_: int) -> int:
        done = 0
        with mmap.mmap(-1, _REQUEST_BYTES) as buffer:
            while done == 0 or time.perf_counter() - started < seconds:
                with lock:
                    at = next(order) % requests
                done += os.preadv(descriptor, [buffer], at * _REQUEST_BYTES)
        return done

    with ThreadPoolExecutor(threads) as pool:
        read_bytes = sum(pool.map(read_on, range(threads)))
    return read_bytes / (time.perf_counter() - started) / 1e9
