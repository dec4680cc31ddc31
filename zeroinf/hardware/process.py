"""Reads the host memory of this process, resident now and at its peak, and pauses its garbage collector."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Resident:
    """Resident memory without the pages of mapped files, which the system can drop at any time."""

    own_bytes: int
    shared_bytes: int
    """Memory of no file that can be shared; what the CUDA driver page-locks counts here, although nobody shares it."""

    @property
    def total_bytes(self) -> int:
        return self.own_bytes + self.shared_bytes


def resident(status: Path = Path("/proc/self/status")) -> Resident:
    """Host memory that this process holds now."""
    fields = dict(
        line.split(":", 1) for line in status.read_text(encoding="utf-8", errors="replace").splitlines() if ":" in line
    )
    own, shared = (int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))
    return Resident(own, shared)


@contextmanager
def uncollected(*, for_good: bool = False) -> Iterator[None]:
    """Do not look for garbage in cycles while the block runs, which takes seconds and leaves little of it.

    `for_good`: what it makes stays until the process ends, as modules do, and is never looked at. The collector walks
    over all objects many times during an import of torch and transformers, a fifth of its CPU time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if for_good:
            gc.freeze()
        if was_enabled:
            gc.enable()


class PeakMemory:
    """A thread that remembers what `resident` was when its total was highest."""

    def __init__(self) -> None:
        self._peak = resident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)
        self._thread.start()

    def so_far(self) -> Resident:
        """The peak until now."""
        self._look()
        return self._peak

    def stop(self) -> Resident:
        """Stop watching; returns the peak."""
        self._stop.set()
        self._thread.join()
        return self.so_far()

    def _watch(self) -> None:
        while not self._stop.wait(_POLL_S):
            self._look()

    def _look(self) -> None:
        now = resident()
        if now.total_bytes > self._peak.total_bytes:
            self._peak = now


def process_age_s() -> float:
    """Seconds since this process was started: imports and all.

    Both times count from boot; psutil's adds the time of boot, which Linux tells in whole seconds.
    """
    fields = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()  # past the name, whose bytes are cut
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started
