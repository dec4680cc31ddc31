"""Workloads of any number of rows, from a few that were simulated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from zeroinf.planner.allocator import Event
from zeroinf.planner.workload import Kernel, Kernels, Simulate, Step, Workload

# The line is not followed further than this many times the most rows that were found to lie on it.
_REACH = 8


class ByRows:
    """Answers for `simulate`, but asks it for a few numbers of rows only.

    All that a micro-batch allocates, reads and computes is a straight line in its rows: two workloads give it, and a
    third one must lie on it to the byte, as must one far beyond them. Where one does not, every number of rows is
    simulated. One row is a case of its own: nothing is padded there.
    """

    def __init__(self, simulate: Simulate) -> None:
        self._simulate = simulate
        self._known: dict[int, Workload] = {}
        self._points: list[Workload] = []
        self._line: _Line | None = None
        self._is_bent = False

    def __call__(self, rows: int) -> Workload:
        if rows not in self._known:
            if rows > 1 and self._line is not None and rows <= _REACH * self._points[-1].rows:
                self._known[rows] = self._line.at(rows)
            else:
                self._known[rows] = self._simulate(rows)
                if rows > 1 and not self._is_bent:
                    self._learn(self._known[rows])
        return self._known[rows]

    def _learn(self, found: Workload) -> None:
        """Draw the line, or hold what was `found` against it."""
        self._points.append(found)
        if len(self._points) < 3:
            return
        first, *_, before, _ = self._points
        self._is_bent = not _Line(first, before).holds(found)
        self._line = None if self._is_bent else _Line(first, found)


@dataclass(frozen=True, slots=True)
class _Line:
    """The workloads between and beyond two."""

    one: Workload
    other: Workload

    def holds(self, found: Workload) -> bool:
        """Whether `found` lies on the line."""
        try:
            return self.at(found.rows) == found
        except ValueError:
            return False

    def at(self, rows: int) -> Workload:
        """The workload of `rows` rows. Raises ValueError where the two do not do the same things in other sizes."""
        one, other = self.one, self.other
        return replace(
            one,
            rows=rows,
            cache=self._events(one.cache, other.cache, rows),
            prefill=self._step(one.prefill, other.prefill, rows),
            first_decode=self._step(one.first_decode, other.first_decode, rows),
            last_decode=self._step(one.last_decode, other.last_decode, rows),
        )

    def _step(self, one: Step, other: Step, rows: int) -> Step:
        groups = zip(one.kernels, other.kernels, strict=True)
        return Step(
            events=self._events(one.events, other.events, rows),
            kernels=tuple(Kernels(a.times, self._kernels(a.kernels, b.kernels, rows)) for a, b in groups),
        )

    def _events(self, one: Sequence[Event], other: Sequence[Event], rows: int) -> tuple[Event, ...]:
        return tuple(
            a if a.nbytes is None or b.nbytes is None else Event(a.key, self._between(a.nbytes, b.nbytes, rows))
            for a, b in zip(one, other, strict=True)
        )

    def _kernels(self, one: Sequence[Kernel], other: Sequence[Kernel], rows: int) -> tuple[Kernel, ...]:
        return tuple(
            replace(a, flops=self._between(a.flops, b.flops, rows), nbytes=self._between(a.nbytes, b.nbytes, rows))
            for a, b in zip(one, other, strict=True)
        )

    def _between(self, one: int, other: int, rows: int) -> int:
        return one + (other - one) * (rows - self.one.rows) // (self.other.rows - self.one.rows)
