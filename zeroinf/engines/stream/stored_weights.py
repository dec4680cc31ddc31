"""Weights from a store: finds or writes the store when a run starts, and reads pieces from it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from zeroinf.distributed.control import Control
from zeroinf.engines.base import LoadListener
from zeroinf.engines.stream.data_files import DataFiles, direct_is_possible, read_pieces
from zeroinf.engines.stream.host_memory import view_of
from zeroinf.engines.stream.store import (
    StoreContents,
    StoredPiece,
    in_order,
    is_whole,
    lock_file,
    of_other_formats,
    open_store,
    padded,
    source_key,
    store_names,
)
from zeroinf.engines.stream.store_lock import StoreLock
from zeroinf.engines.stream.tensor_groups import TensorGroup
from zeroinf.engines.stream.weight_source import LoadProgress, Pieces, WeightSource
from zeroinf.engines.stream.write_store import require_room, taken_bytes, write_store
from zeroinf.model.identity import weights_identity
from zeroinf.model.source import ModelSource
from zeroinf.planner.memory import store_bytes
from zeroinf.planner.plan import Plan
from zeroinf.planner.wire import Wire
from zeroinf.sizes import gib


class StoreInUse:
    """A whole store and its opened files. As long as it is held, nobody can remove the store."""

    def __init__(
        self,
        contents: StoreContents,
        paths: Sequence[Path],
        control: Control,
        origin: Callable[[], WeightSource],
        listener: LoadListener,
    ) -> None:
        """Open the store; one rank of each node writes it from `origin` first where it is not there."""
        self._lock = StoreLock([lock_file(path, contents.name) for path in paths])
        direct = direct_is_possible(paths)
        if not direct and control.world.is_main:
            listener.note(f"no O_DIRECT below {', '.join(map(str, paths))}: the store goes through the page cache")
        try:
            if control.world.local_rank == 0:
                self._find_or_write(contents, paths, origin, listener, direct=direct)
            control.all_gather(None)
            self._lock.share(lambda: None)
            store = open_store(paths, contents.name)
            assert store is not None
            self.store = store
            self.files = DataFiles(store.folders, direct=direct)
        except BaseException:
            self._lock.release()
            raise

    def _find_or_write(
        self,
        contents: StoreContents,
        paths: Sequence[Path],
        origin: Callable[[], WeightSource],
        listener: LoadListener,
        *,
        direct: bool,
    ) -> None:
        def waiting() -> None:
            listener.note(f"another process writes the store {contents.name}: waiting for its end")

        self._lock.share(waiting)
        if open_store(paths, contents.name) is not None:
            return
        self._lock.take(waiting)
        if open_store(paths, contents.name) is None:
            where = ", ".join(map(str, paths))
            listener.note(f"writing {gib(contents.data_bytes)} of weights below {where}, once")
            if old := sorted({name for path in paths for name in of_other_formats(path)}):
                words = " ".join([*old, *(f"--nvme-path {path}" for path in paths)])
                listener.note(
                    f"{len(old)} stores there were written by another version of zeroinf and are not used; "
                    f"to make room: zeroinf store remove {words}"
                )
            write_store(contents, paths, origin(), direct=direct)

    def close(self) -> None:
        self.files.close()
        self._lock.release()


class StoredWeights:
    """Fills pieces from a store. The ranks of a node share the reading."""

    def __init__(self, used: StoreInUse, control: Control, load_progress: LoadProgress) -> None:
        self._used = used
        self._part, self._parts = control.world.local_rank, control.world.local_size
        self._load_progress = load_progress

    def fill(self, pieces: Pieces) -> None:
        """Read this rank's part of the pieces, comparing it with its digests. Raises StoreError."""
        store = self._used.store
        reads = []
        for piece, memory in pieces:
            data = view_of(memory)
            for request in store.contents.file_ranges(piece, 0, len(data)):
                reads.append((piece, request, data[request.start : request.start + request.nbytes]))
        mine = reads[self._part :: self._parts]
        read_pieces(store, self._used.files, mine)
        self._load_progress.add(sum(request.nbytes for _, request, _ in mine) * self._parts)


def check_room(plan: Plan, source: ModelSource) -> None:
    """Raise DoesNotFitError unless the disks have room for what a run of the plan would still write of its store."""
    pattern = _pattern(plan.nvme_paths, source, plan.dtype, plan.wire)
    first, *_ = in_order(plan.nvme_paths)
    if any(is_whole(first, name) for name in store_names(first, pattern)):
        return
    require_room(plan.nvme_paths, store_bytes(plan.anatomy, plan.wire, plan.embeddings, plan.expert_parts), pattern)


def room_taken(paths: Sequence[Path], source: ModelSource, dtype: str, wire: Wire) -> int:
    """Bytes of the disks that stores of these weights, whole or not, have taken already: they are not needed again."""
    return sum(taken_bytes(path, _pattern(paths, source, dtype, wire)) for path in paths)


def _pattern(paths: Sequence[Path], source: ModelSource, dtype: str, wire: Wire) -> str:
    """A glob pattern that the names of all stores of these weights match."""
    return f"{source_key(weights_identity(source), dtype, wire, len(paths))}-*"


def describe(groups: Sequence[TensorGroup], plan: Plan, source: ModelSource) -> StoreContents:
    """The contents of a store for a model's groups of tensors."""
    pieces, end = [], 0
    for group in groups:
        named = zip(group.tensors, group.layout.locations, strict=True)
        tensors = tuple((t.names[0], str(p.dtype), tuple(p.shape), p.offset) for t, p in named)
        pieces.append(StoredPiece(offset=end, nbytes=group.nbytes, tensors=tensors))
        end += padded(group.nbytes)
    return StoreContents(
        model=source.name,
        revision=source.revision,
        architecture=plan.anatomy.architecture,
        dtype=plan.dtype,
        wire=plan.wire,
        source=weights_identity(source),
        made=_digest_of_buffers(groups),
        parts=len(plan.nvme_paths),
        pieces=tuple(pieces),
    )


def _digest_of_buffers(groups: Sequence[TensorGroup]) -> str:
    """Releases of libraries may compute a rotary embedding's frequencies differently: then the store is another."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in (tensor for group in groups for tensor in group.tensors if not tensor.is_parameter):
        digest.update(view_of(tensor.value.contiguous().view(-1).view(torch.uint8)))
    return digest.hexdigest()
