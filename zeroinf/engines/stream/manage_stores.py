"""Lists, verifies and removes stores for the user."""

from __future__ import annotations

import mmap
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from zeroinf.engines.stream.data_files import THREADS, DataFiles, direct_is_possible
from zeroinf.engines.stream.store import (
    REQUEST_BYTES,
    FileRange,
    ForbiddenStoreError,
    Store,
    data_file,
    forbidden,
    header_file,
    in_order,
    lock_file,
    of_other_formats,
    open_store,
    store_folder,
    store_names,
)
from zeroinf.engines.stream.store_lock import StoreLock
from zeroinf.errors import StoreError, UsageError
from zeroinf.planner.wire import Wire

StoreState = Literal["whole", "unfinished", "damaged", "forbidden", "unused"]
"""Unused are those that another version of zeroinf wrote."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreSummary:
    """One store, as far as the given paths hold it."""

    name: str
    state: StoreState
    detail: str
    """What is wrong with it; empty if nothing is."""
    model: str | None
    revision: str | None
    architecture: str | None
    dtype: str | None
    wire: Wire | None
    disk_bytes: int
    paths: tuple[Path, ...]


def list_stores(paths: Sequence[Path]) -> list[StoreSummary]:
    """Every store of which at least one part lies below one of `paths`, by name. Reads headers, no data."""
    return [_summarise(name, _holding(paths, name)) for name in sorted({n for p in paths for n in store_names(p)})]


def find_store(paths: Sequence[Path], name: str) -> Store:
    """The whole store `name`. Raises UsageError where there is none, StoreError where it is damaged."""
    holding = _holding(paths, name)
    if not holding:
        raise UsageError(f"no store {name} below {', '.join(map(str, paths))}", hint="zeroinf store list shows them")
    store = open_store(holding, name)
    if store is None:
        raise StoreError(f"the store {name} is not finished", hint="the next run that needs it continues writing it")
    return store


def verify_store(store: Store, read: Callable[[int], None]) -> None:
    """Read all of the data and compare it with its digests; `read` is told how many bytes, from several threads.

    Raises StoreError for the first damage found.
    """
    files = DataFiles(store.folders, direct=direct_is_possible(store.folders))
    scratch = threading.local()

    def one(job: tuple[int, FileRange]) -> None:
        piece, request = job
        if not hasattr(scratch, "memory"):
            scratch.memory = mmap.mmap(-1, REQUEST_BYTES)
        data = memoryview(scratch.memory)[: request.nbytes]
        files.read(request, data)
        store.check(piece, request, data)
        read(request.nbytes)

    pieces = store.contents.pieces
    jobs = (
        (i, request) for i, piece in enumerate(pieces) for request in store.contents.file_ranges(i, 0, piece.nbytes)
    )
    pool = ThreadPoolExecutor(THREADS)
    try:
        for _ in pool.map(one, jobs):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
        files.close()


def remove_store(paths: Sequence[Path], name: str) -> int:
    """Remove the store `name`, whole or not; returns the bytes that this freed.

    Raises UsageError where there is none or a part lies elsewhere, StoreError while it is in use.
    """
    holding = _holding(paths, name)
    if not holding:
        raise UsageError(f"no store {name} below {', '.join(map(str, paths))}", hint="zeroinf store list shows them")
    for path in holding:
        if not os.access(store_folder(path, name), os.W_OK | os.X_OK):
            raise forbidden(store_folder(path, name), "remove")
    with suppress(StoreError):  # what is damaged may go
        open_store(holding, name)
    lock = StoreLock([lock_file(path, name) for path in holding])
    if not lock.try_to_take():
        raise StoreError(f"the store {name} is in use", hint="wait for the run that reads or writes it")
    try:
        freed = sum(_disk_bytes(path, name) for path in holding)
        for path in holding:
            header_file(store_folder(path, name)).unlink(missing_ok=True)  # from here on nobody takes it for whole
        for path in holding:
            shutil.rmtree(store_folder(path, name))
            with suppress(PermissionError):  # another user made it, and may go on using it
                lock_file(path, name).unlink()
            with suppress(OSError):  # other stores lie there
                lock_file(path, name).parent.rmdir()
    finally:
        lock.release()
    return freed


def _holding(paths: Sequence[Path], name: str) -> list[Path]:
    """The folders among `paths` below which a part of the store lies, in the order of its parts."""
    return [path for path in in_order(paths) if store_folder(path, name).is_dir()]


def _summarise(name: str, paths: Sequence[Path]) -> StoreSummary:
    store: Store | None = None
    state: StoreState = "unfinished"
    detail = "a run that needs it goes on writing it"
    try:
        if (store := open_store(paths, name)) is not None:
            state, detail = "whole", ""
    except ForbiddenStoreError as error:
        state, detail = "forbidden", error.message
    except (StoreError, UsageError) as error:
        state, detail = "damaged", error.message
        if any(name in of_other_formats(path) for path in paths):
            state = "unused"
    contents = store.contents if store is not None else None
    return StoreSummary(
        name=name,
        state=state,
        detail=detail,
        model=contents.model if contents is not None else None,
        revision=contents.revision if contents is not None else None,
        architecture=contents.architecture if contents is not None else None,
        dtype=contents.dtype if contents is not None else None,
        wire=contents.wire if contents is not None else None,
        disk_bytes=sum(_disk_bytes(path, name) for path in paths),
        paths=tuple(paths),
    )


def _disk_bytes(path: Path, name: str) -> int:
    file = data_file(store_folder(path, name))
    try:
        return file.stat().st_blocks * 512
    except (FileNotFoundError, PermissionError):
        return 0
