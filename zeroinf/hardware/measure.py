"""Rates measured here and now: the links between host and GPUs, and a disk. All in GB/s (10^9 bytes)."""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_LINK_BYTES = 1 << 30
_LINK_COPIES = 10
_DISK_READ_BYTES = 4 << 20


def measure_links(devices: Sequence[int]) -> tuple[float, ...]:
    """Host to device, from pinned memory, all `devices` at once; a rate for each, in their order."""
    import torch

    hosts = [torch.empty(_LINK_BYTES, dtype=torch.uint8, pin_memory=True).fill_(1) for _ in devices]
    targets = [torch.empty(_LINK_BYTES, dtype=torch.uint8, device=f"cuda:{d}") for d in devices]
    marks: list[tuple[Any, Any]] = []
    for device, host, target in zip(devices, hosts, targets, strict=True):
        with torch.cuda.device(device):
            target.copy_(host, non_blocking=True)  # the first copy sets the driver up
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            for _ in range(_LINK_COPIES):
                target.copy_(host, non_blocking=True)
            end.record()
            marks.append((begin, end))
    for _, end in marks:
        end.synchronize()
    return tuple(_LINK_COPIES * _LINK_BYTES / begin.elapsed_time(end) / 1e6 for begin, end in marks)


def measure_disk(folder: Path, *, file_bytes: int = 4 << 30, threads: int = 8) -> float:
    """Reads past the page cache (O_DIRECT) by `threads` threads, from a file that is written for it and removed.

    Raises OSError where the file system has no O_DIRECT.
    """
    with tempfile.NamedTemporaryFile(dir=folder, prefix="zeroinf-measure-") as file:
        chunk = os.urandom(_DISK_READ_BYTES)
        for _ in range(file_bytes // len(chunk)):
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
        descriptor = os.open(file.name, os.O_RDONLY | os.O_DIRECT)
        try:
            share = file_bytes // threads // _DISK_READ_BYTES * _DISK_READ_BYTES
            started = time.perf_counter()
            with ThreadPoolExecutor(threads) as pool:
                read = sum(pool.map(lambda i: _read_part(descriptor, i * share, share), range(threads)))
            return read / (time.perf_counter() - started) / 1e9
        finally:
            os.close(descriptor)


def _read_part(descriptor: int, start: int, size: int) -> int:
    buffer = mmap.mmap(-1, _DISK_READ_BYTES)
    return sum(os.preadv(descriptor, [buffer], at) for at in range(start, start + size, _DISK_READ_BYTES))
