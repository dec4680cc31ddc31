"""torch's CUDA caching allocator on paper: what it takes from the driver for an order of allocations and frees.

The rules are those of `c10/cuda/CUDACachingAllocator.cpp` with `expandable_segments:True`, which zeroinf runs with:
sizes are rounded up to 512 bytes; requests up to 1 MiB and larger ones have a pool each; a pool is one range of
addresses that grows by whole pages at its end, splits its free blocks at will and joins free neighbours; the smallest
free block that is large enough is taken, the one at the end last. Pages are not given back while a run goes on.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass

ROUND_BYTES = 512
SMALL_BYTES = 1 << 20
SMALL_PAGE_BYTES = 2 << 20
LARGE_PAGE_BYTES = 20 << 20


@dataclass(frozen=True, slots=True)
class Event:
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
    """What an allocation of `nbytes` takes."""
    return max(ROUND_BYTES, -(-nbytes // ROUND_BYTES) * ROUND_BYTES)


class Allocator:
    """Replays events; `usage` tells the peaks so far."""

    def __init__(self) -> None:
        self._small, self._large = _Pool(SMALL_PAGE_BYTES), _Pool(LARGE_PAGE_BYTES)
        self._places: dict[int, tuple[_Pool, int, int]] = {}
        self._live = self._peak = 0

    def replay(self, events: Iterable[Event]) -> None:
        """Carry out `events` in order. Raises KeyError for the end of something that was never allocated."""
        for event in events:
            if event.nbytes is None:
                pool, start, size = self._places.pop(event.key)
                pool.free(start, size)
                self._live -= size
                continue
            size = rounded(event.nbytes)
            pool = self._small if size <= SMALL_BYTES else self._large
            self._places[event.key] = (pool, pool.allocate(size), size)
            self._live += size
            self._peak = max(self._peak, self._live)

    @property
    def live_bytes(self) -> int:
        return self._live

    @property
    def usage(self) -> Usage:
        return Usage(self._peak, self._small.mapped, self._large.mapped)


class _Pool:
    """One growing range of addresses; free blocks are kept by start and by (size, start)."""

    def __init__(self, page_bytes: int) -> None:
        self._page_bytes = page_bytes
        self.mapped = 0
        self._starts: list[int] = []
        self._sizes: dict[int, int] = {}
        self._by_size: list[tuple[int, int]] = []

    def allocate(self, size: int) -> int:
        """The start of `size` bytes: out of the smallest free block that holds them, or of new pages."""
        at = bisect_left(self._by_size, (size, -1))
        if at == len(self._by_size):
            self._grow(size)
            at = bisect_left(self._by_size, (size, -1))
        if at + 1 < len(self._by_size) and sum(self._by_size[at]) == self.mapped:
            at += 1  # the block at the end may still grow, so it counts as the largest
        found, start = self._by_size[at]
        self._remove(start)
        if found > size:
            self._insert(start + size, found - size)
        return start

    def free(self, start: int, size: int) -> None:
        """Give `size` bytes at `start` back, joined with free neighbours."""
        following = start + size
        if following in self._sizes:
            size += self._remove(following)
        before = bisect_left(self._starts, start) - 1
        if before >= 0 and self._starts[before] + self._sizes[self._starts[before]] == start:
            start = self._starts[before]
            size += self._remove(start)
        self._insert(start, size)

    def _grow(self, size: int) -> None:
        """Map as many pages at the end as it takes, with what is free there already, to hold `size`."""
        last = self._starts[-1] if self._starts else None
        free_at_end = self._sizes[last] if last is not None and last + self._sizes[last] == self.mapped else 0
        missing = -(-(size - free_at_end) // self._page_bytes) * self._page_bytes
        self.mapped += missing
        self.free(self.mapped - missing, missing)

    def _insert(self, start: int, size: int) -> None:
        insort(self._starts, start)
        self._sizes[start] = size
        insort(self._by_size, (size, start))

    def _remove(self, start: int) -> int:
        size = self._sizes.pop(start)
        del self._starts[bisect_left(self._starts, start)]
        del self._by_size[bisect_left(self._by_size, (size, start))]
        return size
