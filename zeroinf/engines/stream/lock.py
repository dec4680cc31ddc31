"""Who may read, write or remove a store: a lock that the system drops with the process that holds it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


class StoreLock:
    """Shared by readers, exclusive for whoever writes or removes. The file may be removed by an exclusive holder."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._descriptor = -1

    def share(self, waiting: Callable[[], None]) -> None:
        """Hold it with other readers; calls `waiting` before it has to wait for a writer."""
        if not self._take(fcntl.LOCK_SH, wait=False):
            waiting()
            self._take(fcntl.LOCK_SH, wait=True)

    def take(self, waiting: Callable[[], None]) -> None:
        """Hold it alone; calls `waiting` before it has to wait for others."""
        if not self.try_to_take():
            waiting()
            self._take(fcntl.LOCK_EX, wait=True)

    def try_to_take(self) -> bool:
        """Hold it alone, if nobody else holds it."""
        return self._take(fcntl.LOCK_EX, wait=False)

    def release(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _take(self, kind: int, *, wait: bool) -> bool:
        self.release()
        self._file.parent.mkdir(exist_ok=True)
        while True:
            descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(descriptor, kind if wait else kind | fcntl.LOCK_NB)
                if self._is_still_there(descriptor):
                    self._descriptor = descriptor
                    return True
            except BlockingIOError:
                os.close(descriptor)
                return False
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def _is_still_there(self, descriptor: int) -> bool:
        with suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(descriptor), self._file.stat())
        return False
