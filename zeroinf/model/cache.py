"""Folders in the user's cache that are complete or absent, and digests of files."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from zeroinf.errors import EnvironmentProblem
from zeroinf.paths import GUARDED_FILE, cache_directory, flush, make_guarded, make_shared, open_lock

_OTHERS_WRITE = 0o022
_FULL = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Return `folder`; when it does not exist, let `build` fill it first, in one process at a time.

    `build` writes into a sibling that takes the name `folder` only when all of it is on the disk: a process that is
    killed on the way leaves nothing that a later one would use. Several ranks may call this at once, and several users.
    Raises EnvironmentProblem where the cache may not be written, or is full.
    """
    if folder.is_dir():
        return folder
    with _locked(folder.with_name(f"{folder.name}.lock")):
        if not folder.is_dir():
            partial = folder.with_name(f"{folder.name}.partial-{os.getuid()}")
            shutil.rmtree(partial, ignore_errors=True)
            try:
                make_guarded(partial)
                build(partial)
                for path in [*partial.rglob("*"), partial]:
                    path.chmod(path.stat().st_mode & ~_OTHERS_WRITE)
                    flush(path)
                partial.rename(folder)
                flush(folder.parent)
            except Exception as error:  # safetensors and tokenizers have errors of their own for a full disk
                full = next((each for each in _FULL if each in str(error)), None)
                if full is None:
                    raise
                shutil.rmtree(partial, ignore_errors=True)
                raise _unwritable(folder.parent, full) from error
    return folder


def file_digest(path: Path) -> str:
    """SHA-256 of a file; remembered by path, size and time of change, since a large file takes a minute to read."""
    path = path.resolve()
    status = path.stat()
    identity = hashlib.sha256(f"{path}\0{status.st_size}\0{status.st_mtime_ns}".encode()).hexdigest()
    memory = cache_directory() / "digests" / identity
    with suppress(OSError):
        if len(known := memory.read_text(encoding="ascii")) == 2 * hashlib.sha256().digest_size:
            return known
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    with suppress(OSError):  # of a cache that others keep, or that is full, nothing is changed
        make_shared(memory.parent)
        memory.touch(GUARDED_FILE)
        memory.write_text(digest, encoding="ascii")
    return digest


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    try:
        make_shared(path.parent)
        descriptor = open_lock(path)
    except OSError as error:
        raise _unwritable(path.parent, error.strerror) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _unwritable(cache: Path, why: str | None) -> EnvironmentProblem:
    return EnvironmentProblem(f"cannot write to the cache {cache}: {why}", hint="set ZEROINF_CACHE to another folder")
