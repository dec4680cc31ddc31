"""Writes a store from a checkpoint, piece by piece. An interrupted write is resumed; a store counts only once it is
complete.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from zeroinf.engines.stream.data_files import THREADS, DataFiles
from zeroinf.engines.stream.host_memory import HostMemory, view_of
from zeroinf.engines.stream.store import (
    FileRange,
    Store,
    StoreContents,
    chunk_digests,
    data_file,
    forbidden,
    is_there,
    journal_file,
    padded,
    store_folder,
    store_names,
    write_headers,
)
from zeroinf.engines.stream.weight_source import WeightSource
from zeroinf.errors import DoesNotFitError, StoreError
from zeroinf.paths import GUARDED_FILE, flush, make_guarded
from zeroinf.sizes import gib

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_store(contents: StoreContents, paths: Sequence[Path], origin: WeightSource, *, direct: bool) -> Store:
    """Write the pieces that are not there yet, and then say that the store is whole.

    Two pieces are in host memory at a time. Whatever ends the process, a later call goes on behind the last piece that
    was finished. The caller holds the store's lock. Raises DoesNotFitError when a disk is too small, StoreError when
    it cannot be written.
    """
    folders = [store_folder(path, contents.name) for path in paths]
    for folder in folders:
        make_guarded(folder)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise forbidden(folder, "finish")
    journal = _Journal(folders, contents)
    require_room(paths, contents.data_bytes, contents.name)
    files = DataFiles(folders, direct=direct, write=True)
    try:
        files.allocate(contents)
        _write_pieces(contents, origin, files, journal)
    except OSError as error:
        if error.errno in _FULL:
            if not journal.digests:
                for folder in folders:
                    shutil.rmtree(folder)
            raise _too_small(paths, contents.data_bytes) from error
        raise StoreError(f"cannot write the store below {paths[0]}: {error.strerror}") from error
    finally:
        files.close()
    store = Store(contents, tuple(folders), tuple(journal.digests[piece] for piece in range(len(contents.pieces))))
    write_headers(store)
    journal.remove()
    return store


def _write_pieces(contents: StoreContents, origin: WeightSource, files: DataFiles, journal: _Journal) -> None:
    """Fill one piece while the one before is digested and written."""
    missing = [piece for piece in range(len(contents.pieces)) if piece not in journal.digests]
    if not missing:
        return
    stages = [HostMemory(max(piece.nbytes for piece in contents.pieces), pin=False) for _ in range(2)]
    with ThreadPoolExecutor(THREADS) as pool:
        under_way: tuple[int, list[Future[list[str]]]] | None = None
        for turn, piece in enumerate(missing):
            stage = stages[turn % 2].bytes[: contents.pieces[piece].nbytes]
            origin.fill([(piece, stage)])
            if under_way is not None:
                _finish(*under_way, files, journal)
            data = view_of(stage)
            file_ranges = contents.file_ranges(piece, 0, len(data))
            under_way = piece, [pool.submit(_write, files, request, data) for request in file_ranges]
        assert under_way is not None
        _finish(*under_way, files, journal)


def _write(files: DataFiles, request: FileRange, piece: memoryview) -> list[str]:
    data = piece[request.start : request.start + request.nbytes]
    files.write(request, data)
    return chunk_digests(data)


def _finish(piece: int, writes: Iterable[Future[list[str]]], files: DataFiles, journal: _Journal) -> None:
    digests = [digest for write in writes for digest in write.result()]
    files.flush()
    journal.add(piece, tuple(digests))


class _Journal:
    """Records the pieces that are on the disks already: a line each, with their digests."""

    def __init__(self, folders: Sequence[Path], contents: StoreContents) -> None:
        self._file = journal_file(folders[0])
        self.digests: dict[int, tuple[str, ...]] = {}
        lengths = [data_file(folder).stat().st_size if data_file(folder).exists() else 0 for folder in folders]
        if lengths == [contents.part_bytes(part) for part in range(contents.parts)] and self._file.exists():
            self._read()
        self._file.touch(GUARDED_FILE)
        with self._file.open("w", encoding="ascii") as file:
            file.writelines(f"{json.dumps(entry)}\n" for entry in self.digests.items())
        flush(self._file.parent)

    def _read(self) -> None:
        for line in self._file.read_text(encoding="ascii", errors="replace").splitlines():
            try:
                piece, digests = json.loads(line)
            except ValueError:  # the process ended in the middle of this line
                return
            self.digests[piece] = tuple(digests)

    def add(self, piece: int, digests: tuple[str, ...]) -> None:
        self.digests[piece] = digests
        with self._file.open("a", encoding="ascii") as file:
            file.write(f"{json.dumps([piece, digests])}\n")
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        self._file.unlink()


def require_room(paths: Sequence[Path], data_bytes: int, pattern: str) -> None:
    """Raise DoesNotFitError unless the disks can take their parts of a store of `data_bytes`.

    What stores whose name matches `pattern` have taken already is counted as theirs.
    """
    for path in paths:
        if shutil.disk_usage(path).free + taken_bytes(path, pattern) < padded(data_bytes) // len(paths):
            raise _too_small(paths, data_bytes)


def taken_bytes(path: Path, pattern: str) -> int:
    """Bytes of disk that stores below `path` take whose name matches `pattern`."""
    files = [data_file(store_folder(path, name)) for name in store_names(path, pattern)]
    return sum(file.stat().st_blocks * 512 for file in files if is_there(file))


def _too_small(paths: Sequence[Path], data_bytes: int) -> DoesNotFitError:
    free = ", ".join(f"{path} has {gib(shutil.disk_usage(path).free)} free" for path in paths)
    return DoesNotFitError(
        f"the store takes {gib(data_bytes // len(paths))} below each --nvme-path, but {free}",
        hint="make room there (`zeroinf store list` shows stores), choose another folder, or --offload cpu",
    )
