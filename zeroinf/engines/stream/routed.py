"""Brings the experts that the tokens of a forward were routed to, and no others, into a slot of the ring of experts.

Input: the parts of a layer's experts, each in host memory or in the store, and the numbers of the experts that are
wanted. Output: a slot that holds these, in their order, laid out as the layer's first part. Experts are copied from
host memory as they lie there, and from the store through a page-locked buffer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from zeroinf.engines.stream.data_files import THREADS
from zeroinf.engines.stream.host_memory import HostMemory, view_of
from zeroinf.engines.stream.ring import Ring, Source
from zeroinf.engines.stream.store import FileRange
from zeroinf.engines.stream.stored_weights import StoreInUse
from zeroinf.engines.stream.tensor_groups import TensorGroup
from zeroinf.model.experts import ExpertParts
from zeroinf.planner.memory import CHUNK_BYTES, round_up, routed_buffer_bytes


@dataclass(frozen=True, slots=True)
class RestingPart:
    """A part of a layer's experts: the number of its piece in the store, and its memory; None where it is on a disk."""

    piece: int
    group: TensorGroup
    memory: torch.Tensor | None


class StoreReader:
    """Reads byte ranges of pieces from a store into one page-locked buffer, each time from its start.

    Data is compared with its digests when it is read for the first time. What was read before must have been copied.
    """

    def __init__(self, used: StoreInUse, nbytes: int, *, pin: bool) -> None:
        self._used, self._memory = used, HostMemory(nbytes, pin=pin)
        self._checked: set[tuple[int, int]] = set()
        self._pool = ThreadPoolExecutor(THREADS, "routed-experts")

    def read(self, ranges: Sequence[tuple[int, int, int]]) -> list[torch.Tensor]:
        """The bytes (uint8, in the buffer) of each (piece, start, bytes). Raises StoreError."""
        contents, end, found = self._used.store.contents, 0, list[torch.Tensor]()
        jobs = list[tuple[int, FileRange, memoryview]]()
        for piece, start, nbytes in ranges:
            first = start - start % CHUNK_BYTES
            last = min(round_up(start + nbytes, CHUNK_BYTES), contents.pieces[piece].nbytes)
            memory = self._memory.bytes[end : end + last - first]
            end += last - first
            found.append(memory[start - first : start - first + nbytes])
            data = view_of(memory)
            for request in contents.file_ranges(piece, first, last):
                jobs.append((piece, request, data[request.start - first : request.start - first + request.nbytes]))
        list(self._pool.map(self._read, jobs))
        return found

    def _read(self, job: tuple[int, FileRange, memoryview]) -> None:
        piece, request, target = job
        self._used.files.read(request, target)
        if (piece, request.start) not in self._checked:
            self._used.store.check(piece, request, target)
            self._checked.add((piece, request.start))

    @property
    def pinned_bytes(self) -> int:
        return self._memory.pinned_bytes

    def close(self) -> None:
        """Free the buffer. No copy from it may be under way."""
        self._pool.shutdown()
        self._memory.close()


def store_reader(used: StoreInUse, groups: Sequence[TensorGroup], *, pin: bool) -> StoreReader:
    """A reader with room for as many experts as the largest of `groups`, parts of experts, holds."""
    largest = max(groups, key=lambda group: group.nbytes)
    assert largest.entries is not None
    count = len(largest.entries)
    return StoreReader(used, routed_buffer_bytes(largest.nbytes, count * len(largest.layout.entries(count))), pin=pin)


class RoutedExperts:
    """The experts of one layer that pass through `ring`, where they are brought one by one."""

    def __init__(
        self,
        parts: Sequence[RestingPart],
        ring: Ring,
        reader: StoreReader | None,
        bind: Callable[[int], None],
        release: Callable[[], None],
    ) -> None:
        """`bind` gives the module the experts in a slot, by its number, and `release` is called when they have been
        used. Parts on a disk need a `reader`."""
        self._ring, self._reader, self._bind, self._release = ring, reader, bind, release
        self._places: dict[int, tuple[RestingPart, int, tuple[tuple[int, int], ...]]] = {}
        """Where each expert rests: its part, its number in it, and the entries of that part's layout."""
        for part in parts:
            assert part.group.entries is not None
            own = part.group.layout.entries(len(part.group.entries))
            self._places |= {expert: (part, at, own) for at, expert in enumerate(part.group.entries)}
        _, _, self._target = self._places[0]
        self.nbytes = sum(part.group.nbytes for part in parts)
        self.brought_bytes = 0

    def enter(self, experts: Sequence[int]) -> None:
        """Give the module these experts, of which there are no more than the first part has."""
        self._bind(self._ring.bring(lambda: self._sources(experts)))
        self.brought_bytes += len(experts) * sum(nbytes for _, nbytes in self._target)

    def leave(self) -> None:
        self._release()
        self._ring.give_back()

    def _sources(self, experts: Sequence[int]) -> tuple[list[Source], float]:
        """What makes up these experts, and for how many seconds a disk was waited for."""
        found, on_disk, offsets = list[Source](), list[tuple[int, int, int]](), list[int]()
        for turn, expert in enumerate(experts):
            part, at, entries = self._places[expert]
            for (start, nbytes), (target, _) in zip(entries, self._target, strict=True):
                if part.memory is not None:
                    memory = part.memory[start + at * nbytes : start + (at + 1) * nbytes]
                    found.append((memory, target + turn * nbytes))
                else:
                    on_disk.append((part.piece, start + at * nbytes, nbytes))
                    offsets.append(target + turn * nbytes)
        if not on_disk:
            return found, 0.0
        assert self._reader is not None
        self._ring.settle()  # the buffer is free once it has been copied
        started = time.perf_counter()
        found += zip(self._reader.read(on_disk), offsets, strict=True)
        return found, time.perf_counter() - started


class Routing:
    """Decides for each pass whether all experts pass through the `ring`, or only those that tokens are routed to."""

    def __init__(self, ring: Ring, tokens: int, units: int, reader: StoreReader | None) -> None:
        """Passes of so many `tokens` or fewer bring few experts; a pass visits so many `units`."""
        self._ring, self._tokens, self.reader = ring, tokens, reader
        self._layers: list[tuple[ExpertParts, RoutedExperts]] = []
        self._units = list(range(units))
        self.passes = 0

    def add(self, split: ExpertParts, experts: RoutedExperts, units: range) -> None:
        """Let the layer `split`, whose parts are the `units` of a pass, have `experts` brought."""
        self._layers.append((split, experts))
        self._units = [unit for unit in self._units if unit not in units]

    def begin(self, tokens: int) -> Sequence[int] | None:
        """A pass of so many tokens begins: the units that its forwards visit in step, None for all."""
        few = tokens <= self._tokens
        for split, experts in self._layers:
            split.chosen = experts if few else None
        if few:
            self.passes += 1
            return self._units
        self._ring.begin()
        return None

    @property
    def spared_bytes(self) -> int:
        """Of experts that were not brought, in all passes of few tokens."""
        return sum(self.passes * experts.nbytes - experts.brought_bytes for _, experts in self._layers)

    @property
    def pinned_bytes(self) -> int:
        return self.reader.pinned_bytes if self.reader is not None else 0

    def close(self) -> None:
        """Free the buffer of what is read. No copy from it may be under way."""
        if self.reader is not None:
            self.reader.close()
