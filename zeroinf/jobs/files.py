"""Durable files: each write of a line or a whole file either succeeds completely or leaves nothing, whatever happens to
the process or the machine.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from zeroinf.paths import flush

_CHUNK_BYTES = 1 << 20
_LOCK_TRIES, _LOCK_PAUSE_S = 5, 0.1
"""`zeroinf status` holds a lock for the moment in which it asks whether somebody else does."""


class LineFile:
    """A file that grows by whole lines and that one process at a time has open.

    A line for which there is no room is cut off again. The file is made with the user's umask.
    """

    def __init__(self, path: Path) -> None:
        """Raises BlockingIOError where another process has it open, OSError where it cannot be made or written."""
        self.path = path
        self.size_bytes = 0
        self._descriptor = _open_locked(path)

    def append(self, line: bytes) -> None:
        """Write a line with its end. From here on the process may die without losing it; `sync` is for the machine."""
        try:
            _write_all(self._descriptor, line)
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._descriptor, self.size_bytes)
            raise
        self.size_bytes += len(line)

    def cut(self, size_bytes: int) -> None:
        """Keep the first `size_bytes`, for good."""
        os.ftruncate(self._descriptor, size_bytes)
        os.fsync(self._descriptor)
        self.size_bytes = size_bytes

    def sync(self) -> None:
        """Make all lines durable. Raises FileNotFoundError where the file no longer lies under its name."""
        os.fsync(self._descriptor)
        if not _is(self._descriptor, self.path):
            raise FileNotFoundError(errno.ENOENT, "it was removed, moved or replaced during the run")

    def rescue(self) -> None:
        """Put what is in the file under its name again, where somebody removed it. Raises OSError where that fails."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():  # perhaps another run has begun there
            raise FileExistsError(errno.EEXIST, "another file has its name now")
        size = os.fstat(self._descriptor).st_size
        with Path(f"/proc/self/fd/{self._descriptor}").open("rb") as source:
            write_new(self.path, lambda copy: _copy(source.read, copy, size))
        flush(self.path.parent)

    def remove(self) -> None:
        """Take the file away, as long as it is ours."""
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let others have it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def is_held(path: Path) -> bool:
    """Whether a process has `path` open as a LineFile."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def write_lines(lines: Iterable[str]) -> Callable[[int], None]:
    """A writer for `write_new`: one line each. Half a surrogate pair, which has no UTF-8, becomes its JSON escape."""

    def write(descriptor: int) -> None:
        chunk = bytearray()
        for line in lines:
            chunk += encoded(line)
            if len(chunk) >= _CHUNK_BYTES:
                _write_all(descriptor, bytes(chunk))
                chunk.clear()
        _write_all(descriptor, bytes(chunk))

    return write


def encoded(line: str) -> bytes:
    """The bytes of a line of JSON, with its end."""
    return (line + "\n").encode("utf-8", "backslashreplace")


def write_new(path: Path, write: Callable[[int], None]) -> None:
    """Let `write` fill a file, given its descriptor, and make it durable; replaces what is there."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        write(descriptor)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename(source: Path, target: Path) -> None:
    """Give `source` the name `target`, durably."""
    os.replace(source, target)  # noqa: PTH105 - as the other writes here
    flush(target.parent)


def content_digest(path: Path) -> str:
    """Digest of what a file holds. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_folder(folder: Path, mode: int = 0o777) -> None:
    """Make a folder, and those above it that are missing, durably, whoever has begun it. Raises OSError."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    for each in reversed(missing):
        each.mkdir(mode, exist_ok=True)
        flush(each.parent)
    flush(folder.parent)


def _open_locked(path: Path) -> int:
    for attempt in range(_LOCK_TRIES):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is(descriptor, path):  # not one that its last owner has just removed
                return descriptor
        except BlockingIOError:
            if attempt == _LOCK_TRIES - 1:
                os.close(descriptor)
                raise
            time.sleep(_LOCK_PAUSE_S)
        os.close(descriptor)
    raise BlockingIOError(errno.EAGAIN, "it is made and removed again and again")


def _is(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _write_all(descriptor: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]


def _copy(read: Callable[[int], bytes], descriptor: int, size: int) -> None:
    while size > 0 and (data := read(min(size, _CHUNK_BYTES))):
        _write_all(descriptor, data)
        size -= len(data)
