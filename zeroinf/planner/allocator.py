"""Simulates torch's CUDA caching allocator: the memory that it takes from the driver for a sequence of allocations and
frees.

The rules are those of `c10/cuda/CUDACachingAllocator.cpp` with `expandable_segments:True`, which zeroinf sets: sizes
are rounded up to 512 bytes; requests up to 1 MiB and larger ones have separate pools; a pool is one range of addresses
that grows by whole pages at its end, splits its free blocks freely and joins free neighbours; the smallest free block
that is large enough is taken, the one at the end last. Pages are not given back during a run.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

ROUND_BYTES = 512
SMALL_BYTES = 1 << 20
SMALL_PAGE_BYTES = 2 << 20
LARGE_PAGE_BYTES = 20 << 20

_START_BITS = 48
_START = (1 << _START_BITS) - 1


class Event(NamedTuple):  # which is made and read several times as fast as a dataclass: plans take millions
    """An allocation of `nbytes` under the name `key`, or, with `nbytes` None, its end."""

    key: int
    nbytes: int | None = None


Events = tuple[Event, ...]


@dataclass(frozen=True, slots=True)
class Usage:
    """Highest values seen, in bytes: of live tensors, each rounded up, and of what was taken from the driver, small
    tensors' pool and that of large ones."""

    allocated: int
    small: int
    large: int

    @property
    def reserved(self) -> int:
        return self.small + self.large


def rounded(nbytes: int) -> int:
    """Bytes that an allocation of `nbytes` takes."""
    return -(-nbytes // ROUND_BYTES) * ROUND_BYTES or ROUND_BYTES


class Allocator:
    """Replays events; `usage` tells the peaks so far."""

    def __init__(self) -> None:
        self._small, self._large = _Pool(SMALL_PAGE_BYTES), _Pool(LARGE_PAGE_BYTES)
        self._places: dict[int, _Place] = {}
        self._live = self._peak = 0
        self._owned: dict[tuple[int, int], _Place] = {}
        self._crossing: dict[int, Crossing] = {}
        self._replayed: dict[tuple[int, _State, tuple[_Place, ...]], _Replayed] = {}

    def replay(self, events: Iterable[Event]) -> None:
        """Carry out `events` in order. Raises KeyError for the end of something that was never allocated."""
        places, small, large, live, peak = self._places, self._small, self._large, self._live, self._peak
        for key, nbytes in events:
            if nbytes is None:
                pool, start, size = places.pop(key)
                pool.free(start, size)
                live -= size
                continue
            size = rounded(nbytes)
            pool = small if size <= SMALL_BYTES else large
            places[key] = (pool, pool.allocate(size), size)
            live += size
            if live > peak:
                peak = live
        self._live, self._peak = live, peak

    def replay_section(self, section: Events, owner: int) -> None:
        """Carry out `section`, whose keys are those of `owner`; one that finds the memory as it found it before is not
        walked through again. Sections that are the same must be one object."""
        crossing = self._crossing.get(id(section))
        if crossing is None:
            crossing = self._crossing[id(section)] = Crossing.of(section)
        ending = tuple(self._owned.pop((owner, key)) for key in crossing.ending)
        before = self._small.state, self._large.state
        found = self._replayed.get((id(section), before, ending))
        if found is None:
            found = self._replayed[id(section), before, ending] = self._walk(crossing, ending)
        else:
            self._small.state, self._large.state = found.after
        self._peak = max(self._peak, self._live + found.peak)
        self._live += found.change
        self._owned.update(((owner, key), place) for key, place in zip(crossing.lasting, found.lasting, strict=True))

    def end_sections(self) -> None:
        """End all that sections left, in the order in which they took it."""
        for pool, start, size in self._owned.values():
            pool.free(start, size)
            self._live -= size
        self._owned.clear()

    def _walk(self, crossing: Crossing, ending: Sequence[_Place]) -> _Replayed:
        other = Allocator()
        other._small, other._large = self._small, self._large
        other._places = dict(zip(crossing.ending, ending, strict=True))
        other.replay(crossing.section)
        lasting = tuple(other._places[key] for key in crossing.lasting)
        return _Replayed(other._peak, other._live, lasting, (self._small.state, self._large.state))

    @property
    def live_bytes(self) -> int:
        return self._live

    @property
    def usage(self) -> Usage:
        return Usage(self._peak, self._small.mapped, self._large.mapped)


@dataclass(frozen=True, slots=True)
class Crossing:
    """Keys that cross the borders of a section of events."""

    section: Events
    ending: tuple[int, ...]
    """Those that were there before, and end in it."""
    lasting: tuple[int, ...]
    """Those that begin in it, and are there after."""

    @classmethod
    def of(cls, section: Events) -> Crossing:
        begun: dict[int, None] = {}
        ending = []
        for key, nbytes in section:
            if nbytes is not None:
                begun[key] = None
            elif key in begun:
                del begun[key]
            else:
                ending.append(key)
        return cls(section, tuple(ending), tuple(begun))


@dataclass(frozen=True, slots=True)
class _Replayed:
    """A section's effect on memory that it found in some state."""

    peak: int
    """The most bytes that it adds at any time."""
    change: int
    lasting: tuple[_Place, ...]
    after: _State


class _Pool:
    """One growing range of addresses. Free blocks are known by where they start, by where they end, and in the order of
    their sizes as one number each, the size above the start."""

    def __init__(self, page_bytes: int) -> None:
        self._page_bytes = page_bytes
        self.mapped = 0
        self._sizes: dict[int, int] = {}
        self._starts: dict[int, int] = {}
        self._by_size: list[int] = []

    @property
    def state(self) -> _PoolState:
        """All that later places follow from: the bytes that are mapped, and the free blocks."""
        return self.mapped, tuple(self._by_size)

    @state.setter
    def state(self, state: _PoolState) -> None:
        self.mapped, by_size = state
        self._by_size = list(by_size)
        self._sizes = {each & _START: each >> _START_BITS for each in by_size}
        self._starts = {start + size: start for start, size in self._sizes.items()}

    def allocate(self, size: int) -> int:
        """The start of `size` bytes: out of the smallest free block that holds them, or of new pages."""
        by_size = self._by_size
        at = bisect_left(by_size, size << _START_BITS)
        if at == len(by_size):
            self._grow(size)
            at = bisect_left(by_size, size << _START_BITS)
        start = by_size[at] & _START
        if at + 1 < len(by_size) and start + self._sizes[start] == self.mapped:
            at += 1  # the block at the end may still grow, so it counts as the largest
            start = by_size[at] & _START
        del by_size[at]
        found = self._sizes.pop(start)
        if found > size:
            self._insert(start + size, found - size)
        else:
            del self._starts[start + size]
        return start

    def free(self, start: int, size: int) -> None:
        """Give `size` bytes at `start` back, joined with free neighbours."""
        if (following := self._sizes.pop(start + size, None)) is not None:
            self._forget(start + size, following)
            size += following
        if (before := self._starts.pop(start, None)) is not None:
            self._forget(before, start - before)
            size += start - before
            start = before
        self._insert(start, size)

    def _grow(self, size: int) -> None:
        """Map as many pages at the end as it takes, with what is free there already, to hold `size`."""
        free_at_end = self.mapped - self._starts.get(self.mapped, self.mapped)
        missing = -(-(size - free_at_end) // self._page_bytes) * self._page_bytes
        self.mapped += missing
        self.free(self.mapped - missing, missing)

    def _insert(self, start: int, size: int) -> None:
        self._sizes[start] = size
        self._starts[start + size] = start
        insort(self._by_size, size << _START_BITS | start)

    def _forget(self, start: int, size: int) -> None:
        del self._by_size[bisect_left(self._by_size, size << _START_BITS | start)]


_Place = tuple[_Pool, int, int]
"""Where something lies: its pool, its start and its size."""
_PoolState = tuple[int, tuple[int, ...]]
_State = tuple[_PoolState, _PoolState]
"""Of the pool of small tensors and of that of large ones."""
