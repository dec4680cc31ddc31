"""Reads the properties of a folder for weights: free space, permissions, file system, and whether O_DIRECT works, which
is tried.
"""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import tempfile
from pathlib import Path

import psutil

from zeroinf.hardware.machine import Disk

# O_DIRECT wants buffer, offset and length aligned to the device's logical block; none is larger than this.
DIRECT_ALIGNMENT_BYTES = 4096

PAGE_READERS = 64
"""Threads that read single pages of files: what keeps an NVMe drive busy with small reads."""


def read_disk(path: Path) -> Disk:
    """Read space, file system and O_DIRECT support of the folder `path`; writes one block to a temporary file."""
    if not path.is_dir():
        return Disk(path=path, exists=False, writable=False, free_bytes=0, total_bytes=0, filesystem="", o_direct=False)
    usage = shutil.disk_usage(path)
    writable, o_direct = _try_file(path)
    mount, device, filesystem = mount_of(path)
    return Disk(
        path=path,
        exists=True,
        writable=writable,
        free_bytes=usage.free,
        total_bytes=usage.total,
        filesystem=filesystem,
        o_direct=o_direct,
        mount=mount,
        device=device,
    )


def mount_of(path: Path) -> tuple[Path | None, str, str]:
    """The mount point of `path`'s file system, its device and its kernel name; None and empty if not known."""
    resolved = path.resolve()
    mounts = [mount for mount in psutil.disk_partitions(all=True) if resolved.is_relative_to(mount.mountpoint)]
    # Of two mounts on one folder the later one is seen, and `max` keeps the first of equals: hence the reversal.
    found = max(reversed(mounts), key=lambda mount: len(mount.mountpoint), default=None)
    return (Path(found.mountpoint), found.device, found.fstype) if found else (None, "", "")


def _try_file(folder: Path) -> tuple[bool, bool]:
    """Whether a file can be made in `folder`, and whether it can be written and read past the page cache."""
    try:
        descriptor, name = tempfile.mkstemp(prefix=".zeroinf-doctor-", dir=folder)
    except OSError:
        return False, False
    os.close(descriptor)
    try:
        return True, supports_o_direct(Path(name))
    finally:
        Path(name).unlink()


def supports_o_direct(file: Path) -> bool:
    """Overwrite the existing `file` with one aligned block through O_DIRECT, read it back, and compare."""
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_DIRECT)
    except OSError:
        return False
    try:
        with mmap.mmap(-1, DIRECT_ALIGNMENT_BYTES) as written, mmap.mmap(-1, DIRECT_ALIGNMENT_BYTES) as read:
            written[:] = os.urandom(DIRECT_ALIGNMENT_BYTES)
            os.pwritev(descriptor, [written], 0)
            os.preadv(descriptor, [read], 0)
            return read[:] == written[:]
    except OSError as error:
        # A full disk took the flag and refused the data: that is a matter of room, reported as such.
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    finally:
        os.close(descriptor)
