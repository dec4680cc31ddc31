"""A first-fit range allocator. It hands out ranges of offsets and touches no memory."""

from __future__ import annotations

from bisect import insort


class RangeAllocator:
    """Allocates contiguous ranges out of `size` offsets, each in the first free range that is wide enough."""

    def __init__(self, size: int) -> None:
        self._holes = [(0, size)] if size else []
        """(start, end) of each, in order; no two of them touch."""

    @property
    def free(self) -> int:
        """Places that nobody has."""
        return sum(end - start for start, end in self._holes)

    def take(self, count: int) -> int | None:
        """The first of `count` places; None where no hole is wide enough."""
        for at, (start, end) in enumerate(self._holes):
            if end - start >= count:
                self._holes[at : at + 1] = [(start + count, end)] if end - start > count else []
                return start
        return None

    def give_back(self, start: int, count: int) -> None:
        """Let others have the `count` places from `start` on."""
        insort(self._holes, (start, start + count))
        joined: list[tuple[int, int]] = []
        for hole in self._holes:
            if joined and joined[-1][1] == hole[0]:
                hole = (joined.pop()[0], hole[1])
            joined.append(hole)
        self._holes = joined
