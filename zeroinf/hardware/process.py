"""What this process itself holds."""

from __future__ import annotations

import threading
from pathlib import Path

_POLL_S = 0.05
_COUNTED = ("RssAnon:", "RssShmem:")


def resident_bytes(status: Path = Path("/proc/self/status")) -> int:
    """Resident memory of this process without the pages of mapped files, which the system can drop at any time."""
    lines = (line.split() for line in status.read_text().splitlines())
    return sum(int(fields[1]) * 1024 for fields in lines if fields and fields[0] in _COUNTED)


class PeakMemory:
    """A thread that remembers the highest `resident_bytes` since it was made."""

    def __init__(self) -> None:
        self._peak = resident_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)
        self._thread.start()

    def so_far(self) -> int:
        """The peak until now, in bytes."""
        return max(self._peak, resident_bytes())

    def stop(self) -> int:
        """Stop watching; returns the peak."""
        self._stop.set()
        self._thread.join()
        return self.so_far()

    def _watch(self) -> None:
        while not self._stop.wait(_POLL_S):
            self._peak = max(self._peak, resident_bytes())
