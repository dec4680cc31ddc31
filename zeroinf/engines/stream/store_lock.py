"""A lock on a store, shared by readers and exclusive for a writer. The system drops it when its process ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from zeroinf.errors import StoreError
from zeroinf.paths import make_shared, open_lock, owner_of


class StoreLock:
    """Shared by readers, exclusive for whoever writes or removes. One file for each part, always in the same order.

    An exclusive holder may remove the files. Users who may write below the same path share them, and the folder in
    which they lie.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files
        self._descriptors: list[int] = []

    def share(self, waiting: Callable[[], None]) -> None:
        """Hold it with other readers; calls `waiting` before it has to wait for a writer."""
        if not self._try(fcntl.LOCK_SH | fcntl.LOCK_NB):
            waiting()
            self._try(fcntl.LOCK_SH)

    def take(self, waiting: Callable[[], None]) -> None:
        """Hold it alone; calls `waiting` before it has to wait for others."""
        if not self.try_to_take():
            waiting()
            self._try(fcntl.LOCK_EX)

    def try_to_take(self) -> bool:
        """Hold it alone, if nobody else holds it."""
        return self._try(fcntl.LOCK_EX | fcntl.LOCK_NB)

    def release(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []

    def _try(self, kind: int) -> bool:
        self.release()
        try:
            for file in self._files:
                self._lock(file, kind)
        except BlockingIOError:
            self.release()
            return False
        return True

    def _lock(self, file: Path, kind: int) -> None:
        while True:
            descriptor = _opened(file)
            self._descriptors.append(descriptor)
            fcntl.flock(descriptor, kind)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), file.stat()):
                    return
            os.close(self._descriptors.pop())  # its last holder removed the file


def _opened(file: Path) -> int:
    try:
        make_shared(file.parent)
        return open_lock(file)
    except PermissionError as error:
        held = file if file.exists() else file.parent if file.parent.exists() else file.parent.parent
        lacks, share = ("read", "a+r") if held == file else ("write", "a+rwxt")
        raise StoreError(
            f"no store can be used below {file.parent}: {held} belongs to {owner_of(held)}, and you may not {lacks} it",
            hint=f"they can share it: chmod {share} {held}; or choose another --nvme-path",
        ) from error
