"""Reads and writes the data files of a store, with O_DIRECT where the file system supports it."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from zeroinf.engines.stream.store import FileRange, Store, StoreContents, damaged, data_file
from zeroinf.errors import StoreError
from zeroinf.hardware.disk import read_disk
from zeroinf.paths import GUARDED_FILE

THREADS = 8
"""Requests in flight: enough to keep an NVMe drive at its full rate; with twice as many most tries read slower."""


def direct_is_possible(folders: Iterable[Path]) -> bool:
    """Whether O_DIRECT works in all of the folders."""
    return all(read_disk(folder).o_direct for folder in folders)


class DataFiles:
    """The opened data files of a store's parts. Any thread may read or write; no more than `THREADS` read at once."""

    def __init__(self, folders: Iterable[Path], *, direct: bool, write: bool = False) -> None:
        self._files = [data_file(folder) for folder in folders]
        flags = (os.O_RDWR | os.O_CREAT if write else os.O_RDONLY) | (os.O_DIRECT if direct else 0) | os.O_CLOEXEC
        self._descriptors: list[int] = []
        self._turns = threading.BoundedSemaphore(THREADS)
        try:
            for file in self._files:
                self._descriptors.append(os.open(file, flags, GUARDED_FILE))
        except OSError as error:
            self.close()
            raise _failed("open", file, error) from error

    def read(self, request: FileRange, target: memoryview) -> None:
        """Read the request's bytes into `target`, which is as long. Raises StoreError."""
        file = self._files[request.part]
        done = 0
        while done < request.nbytes:
            try:
                with self._turns:
                    count = os.preadv(self._descriptors[request.part], [target[done:]], request.at + done)
            except OSError as error:
                raise _failed("read", file, error) from error
            if count == 0:
                raise damaged(file, f"it ends at byte {request.at + done}, before its time")
            done += count

    def write(self, request: FileRange, source: memoryview) -> None:
        """Write the request's bytes from `source`, which is as long. Raises OSError."""
        done = 0
        while done < request.nbytes:
            done += os.pwritev(self._descriptors[request.part], [source[done:]], request.at + done)

    def allocate(self, contents: StoreContents) -> None:
        """Take all the room that the data will need. Raises OSError where there is too little."""
        for part, descriptor in enumerate(self._descriptors):
            try:
                os.posix_fallocate(descriptor, 0, contents.part_bytes(part))
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # the file system does not know how
                    raise
                os.ftruncate(descriptor, contents.part_bytes(part))

    def flush(self) -> None:
        """Return when what was written is on the disks."""
        for descriptor in self._descriptors:
            os.fdatasync(descriptor)

    def close(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []


def read_pieces(store: Store, files: DataFiles, reads: Iterable[tuple[int, FileRange, memoryview]]) -> None:
    """Read each (piece, request, target) and compare it with its digests. Raises the first StoreError."""

    def one(piece: int, request: FileRange, target: memoryview) -> None:
        files.read(request, target)
        store.check(piece, request, target)

    with ThreadPoolExecutor(THREADS) as pool:
        futures = [pool.submit(one, *read) for read in reads]
        try:
            for done in futures:
                done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _failed(verb: str, file: Path, error: OSError) -> StoreError:
    return StoreError(
        f"cannot {verb} {file}: {error.strerror}", hint="check that the disk is mounted and healthy (see dmesg)"
    )
