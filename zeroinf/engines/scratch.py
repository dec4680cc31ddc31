"""Temporary folders that last as long as a run. Folders that killed runs left behind are removed by the next run.

A file lock marks a folder as used: the system drops it with its process. A process number or host name would not do,
since containers on one host may share either and not see each other.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from zeroinf.paths import GUARDED_FILE

_PREFIX = "zeroinf-swap-"
_LOCK = "in-use"


class ScratchFolder:
    """A folder of this process alone, `path`, until `remove`; folders that nobody holds any more go when it is made."""

    def __init__(self, parent: Path) -> None:
        """Raises OSError where `parent` cannot be written."""
        _remove_leftovers(parent)
        made = Path(tempfile.mkdtemp(prefix=".zeroinf-new-", dir=parent))
        self._lock = os.open(made / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, GUARDED_FILE)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        # Only now has it a name that others look for: they never see it without its lock.
        self.path = made.rename(made.with_name(made.name.replace(".zeroinf-new-", _PREFIX)))

    def remove(self) -> None:
        """Remove it, with all that is in it. May be called again."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _remove_leftovers(parent: Path) -> None:
    for folder in parent.glob(f"{_PREFIX}*"):
        with suppress(OSError):  # another user's, or of another version, or somebody else removes it
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)
