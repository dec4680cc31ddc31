"""Crashes at a chosen event of a job: the process dies, the disk loses what was not synced, writes and syncs fail.

A child installs `Faults` before it runs the job. Opening, renaming, removing and truncating files and taking locks are
seen through an audit hook; writes and syncs, of which Python tells no hook, through wrappers.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import stat
import sys
import threading
from pathlib import Path
from typing import Any, Literal, NoReturn

Fault = Literal["kill", "torn write", "unsynced lost", "unsynced torn", "unsynced zeroed", "names lost"]
Failure = Literal["disk full", "sync fails", "folder vanishes"]

CRASHES: tuple[Fault, ...] = ("kill", "torn write", "unsynced lost", "unsynced torn", "unsynced zeroed", "names lost")
FAILURES: tuple[Failure, ...] = ("disk full", "sync fails", "folder vanishes")
DIED = 77

_AUDITED = frozenset(("open", "os.rename", "os.remove", "os.truncate", "os.mkdir", "os.link", "fcntl.flock"))


class Faults:
    """Counts the events of this process on `folder`, and at the `at`-th (from 1) lets `fault` happen.

    `at` 0 only counts. It cannot be taken out again: it is for a process that is about to end.
    """

    def __init__(self, folder: Path, fault: Fault | Failure, at: int, seed: int = 0) -> None:
        self.events: list[str] = []
        self._folder, self._fault, self._at = str(folder), fault, at
        self._random = random.Random(f"{seed}/{fault}/{at}")
        self._synced: dict[int, int] = {}
        """Bytes of each file, by inode, that are on the disk for good."""
        self._names: list[tuple[str, Path, Path | None, bytes | None]] = []
        """What was done to names since their folder was synced: what, where, from where, and what was there before."""
        self._lock = threading.RLock()
        """Held by a thread that dies, so that nothing happens beside it."""
        self._failing = self._is_full = False
        self._quiet = False
        self._wrap()

    def _wrap(self) -> None:
        self._os: dict[str, Any] = {
            name: getattr(os, name)
            for name in ("open", "write", "fsync", "replace", "unlink", "ftruncate", "mkdir", "link")
        }
        for name in self._os:
            setattr(os, name, getattr(self, f"_{name}"))
        sys.addaudithook(self._heard)

    def _heard(self, event: str, args: tuple[Any, ...]) -> None:
        if event in _AUDITED and not self._quiet and self._is_ours(args[0]):
            self._happens(event)

    def _is_ours(self, what: Any) -> bool:
        if isinstance(what, int):
            try:
                what = Path(f"/proc/self/fd/{what}").readlink()
            except OSError:
                return False
        return os.fspath(what).startswith(self._folder) if isinstance(what, str | os.PathLike) else False

    def _happens(self, event: str, torn: tuple[int, bytes] | None = None) -> None:
        with self._lock:
            self._happens_alone(event, torn)

    def _happens_alone(self, event: str, torn: tuple[int, bytes] | None) -> None:
        self.events.append(event)
        if len(self.events) != self._at or self._failing:
            return
        match self._fault:
            case "disk full" | "sync fails":
                self._failing = True
            case "folder vanishes":
                self._quiet = True
                shutil.rmtree(self._folder)
                self._quiet = False
            case "torn write":
                if torn is not None:
                    descriptor, data = torn
                    self._os["write"](descriptor, data[: self._random.randrange(len(data))])
                self._die()
            case _:
                self._die()

    def _die(self) -> NoReturn:
        self._quiet = True
        if self._fault.startswith("unsynced") or self._fault == "names lost":
            self._lose_power()
        os._exit(DIED)

    def _lose_power(self) -> None:
        """What a machine may do that stops: data that was not synced is gone, in part or all, and so are names."""
        for file in filter(Path.is_file, Path(self._folder).rglob("*")):
            status = file.stat()
            synced = min(self._synced.get(status.st_ino, status.st_size), status.st_size)
            if self._fault == "unsynced lost":
                os.truncate(file, synced)
            elif self._fault == "unsynced torn":
                os.truncate(file, self._random.randint(synced, status.st_size))
            elif self._fault == "unsynced zeroed":
                os.truncate(file, synced)
                os.truncate(file, status.st_size)
        if self._fault == "names lost":
            while self._names:
                what, name, source, before = self._names.pop()
                if what == "rename" and source is not None:
                    self._os["replace"](name, source)
                    self._move_names(name, source)
                if before is not None:
                    name.write_bytes(before)
                elif what == "create":
                    name.unlink(missing_ok=True)
                elif what == "create folder":
                    shutil.rmtree(name, ignore_errors=True)

    def _move_names(self, source: Path, target: Path) -> None:
        """A folder has another name, and so has what lies in it."""

        def moved(path: Path) -> Path:
            return target / path.relative_to(source) if path.is_relative_to(source) else path

        self._names = [
            (what, moved(name), None if old is None else moved(old), before) for what, name, old, before in self._names
        ]

    def _open(self, path: Any, flags: int, *more: Any, **named: Any) -> int:
        is_new = bool(flags & os.O_CREAT) and not Path(path).exists() and self._is_ours(path)
        descriptor: int = self._os["open"](path, flags, *more, **named)
        if is_new:
            self._names.append(("create", Path(path), None, None))
        if self._is_ours(path):
            status = os.fstat(descriptor)
            self._synced.setdefault(status.st_ino, status.st_size)
            if is_new or flags & os.O_TRUNC:
                self._synced[status.st_ino] = 0
        return descriptor

    def _write(self, descriptor: int, data: Any) -> int:
        if not self._is_ours(descriptor):
            return int(self._os["write"](descriptor, data))
        self._happens("write", (descriptor, bytes(data)))
        if self._failing and self._fault == "disk full":
            if self._is_full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._is_full = True
            data = bytes(data)[: len(data) // 2]
        return int(self._os["write"](descriptor, data))

    def _fsync(self, descriptor: int) -> None:
        if not self._is_ours(descriptor):
            return
        self._happens("fsync")
        status = os.fstat(descriptor)
        if self._failing and self._fault == "sync fails":
            # As Linux does it: what could not be written is dropped, and is not tried again.
            self._quiet = True
            if stat.S_ISREG(status.st_mode):
                self._os["ftruncate"](descriptor, self._synced.get(status.st_ino, status.st_size))
            self._quiet = False
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if stat.S_ISDIR(status.st_mode):
            folder = Path(f"/proc/self/fd/{descriptor}").readlink()
            self._names = [one for one in self._names if one[1].parent != folder]
        else:
            self._synced[status.st_ino] = status.st_size

    def _replace(self, source: Any, target: Any) -> None:
        before = Path(target).read_bytes() if Path(target).is_file() else None
        self._os["replace"](source, target)
        if not self._is_ours(target):
            return
        self._move_names(Path(source), Path(target))
        self._names.append(("rename", Path(target), Path(source), before))

    def _unlink(self, path: Any, **named: Any) -> None:
        before = Path(path).read_bytes() if Path(path).exists() and self._is_ours(path) else None
        self._os["unlink"](path, **named)
        if before is not None:
            self._names.append(("remove", Path(path), None, before))

    def _mkdir(self, path: Any, *more: Any, **named: Any) -> None:
        self._os["mkdir"](path, *more, **named)
        if self._is_ours(path):
            self._names.append(("create folder", Path(path), None, None))

    def _link(self, source: Any, target: Any, **named: Any) -> None:
        self._os["link"](source, target, **named)
        if self._is_ours(target):
            self._names.append(("create", Path(target), None, None))

    def _ftruncate(self, descriptor: int, length: int) -> None:
        self._os["ftruncate"](descriptor, length)
        inode = os.fstat(descriptor).st_ino
        self._synced[inode] = min(self._synced.get(inode, length), length)
