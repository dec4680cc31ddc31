"""Folders of the user and of the project, and file system operations that are durable and safe to share between
users.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path


def cache_directory() -> Path:
    """The folder of files that can be rebuilt: `$ZEROINF_CACHE`, else `$XDG_CACHE_HOME/zeroinf`, else `~/.cache`."""
    if own := os.environ.get("ZEROINF_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "zeroinf"


def configs_directory() -> Path:
    """The folder `configs`: inside the package where it was installed from a wheel, beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


GUARDED_FILE, _GUARDED_FOLDER = 0o644, 0o755
"""The most that is allowed, whatever the umask, with weights that later runs find: their owner alone writes them."""


def make_guarded(folder: Path) -> None:
    """Make `folder`, and what is missing above it, such that nobody but their owner may write there."""
    for each in (*reversed(folder.parents), folder):
        each.mkdir(_GUARDED_FOLDER, exist_ok=True)


def make_shared(folder: Path) -> None:
    """Make `folder`, and what is missing above it, for those who may make files in the folder above it.

    Nobody may remove or replace what another has made there.
    """
    for each in (*reversed(folder.parents), folder):
        try:
            each.mkdir(_GUARDED_FOLDER)
        except FileExistsError:
            continue
        above, own = each.parent.stat(), each.stat()
        everybody = above.st_mode & stat.S_IRWXO if above.st_mode & stat.S_IWOTH else 0
        shared = everybody | everybody << 3
        if above.st_mode & stat.S_IWGRP and above.st_gid == own.st_gid:
            shared |= above.st_mode & stat.S_IRWXG
        if shared:
            each.chmod(stat.S_IMODE(own.st_mode) | shared | stat.S_ISVTX)


def open_lock(file: Path) -> int:
    """A descriptor of `file` to lock, which is made where it is missing; another user's will do.

    Raises PermissionError where it may be neither read nor made.
    """
    while True:
        try:
            return os.open(file, os.O_RDWR | os.O_CLOEXEC)
        except PermissionError:
            return os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            pass
        try:  # apart, since no other user's file may be opened so where anybody may make files
            made = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, GUARDED_FILE)
        except FileExistsError:
            continue
        os.fchmod(made, GUARDED_FILE)  # there is nothing in it that a umask should keep from others
        return made


def owner_of(path: Path) -> str:
    """The owner of `path`: a user's name, or a number without one."""
    try:
        return path.owner()
    except KeyError:
        return f"user {path.stat().st_uid}"


def flush(path: Path) -> None:
    """Make sure that a file's data, or the names in a folder, survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
