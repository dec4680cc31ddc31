"""Simulates torch's CUDA caching allocator: the memory that it takes from the driver for a sequence of allocations and
frees.

The rules are those of `c10/cuda/CUDACachingAllocator.cpp` with `expandable_segments:True`, which zeroinf sets: sizes
are rounded up to 512 bytes; requests up to 1 MiB and larger ones have separate pools; a pool is one range of addresses
that grows by whole pages at its end, splits its free blocks freely and joins free neighbours; the smallest free block
that is large enough is taken, the one at the end last. Pages are not given back during a run.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
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
        self._places: dict[int, tuple[_Pool, int, int]] = {}
        self._live = self._peak = 0

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

    @property
    def live_bytes(self) -> int:
        return self._live

    @property
    def usage(self) -> Usage:
        return Usage(self._peak, self._small.mapped, self._large.mapped)


class _Pool:
    """One growing range of addresses. Free blocks are known by where they start, by where they end, and in the order of
    their sizes as one number each, the size above the start."""

    def __init__(self, page_bytes: int) -> None:
        self._page_bytes = page_bytes
        self.mapped = 0
        self._sizes: dict[int, int] = {}
        self._starts: dict[int, int] = {}
        self._by_size: list[int] = []

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
