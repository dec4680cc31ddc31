"""Interpolates micro-batches of any number of rows from a few that were simulated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from zeroinf.planner.allocator import Event, Events
from zeroinf.planner.workload import Kernel, Kernels, Step, same

# The line is not followed further than this many times the most rows that were found to lie on it.
_REACH = 8


class ByRows:
    """Answers for `simulate`, but asks it for a few numbers of rows only.

    All that a micro-batch allocates, reads and computes is a straight line in its rows: two steps give it, and a third
    one must lie on it to the byte, as must one far beyond them. Where one does not, every number of rows is simulated.
    One row is a case of its own: nothing is padded there.
    """

    def __init__(self, simulate: Callable[[int], Step]) -> None:
        self._simulate = simulate
        self._known: dict[int, Step] = {}
        self._points: list[tuple[int, Step]] = []
        self._line: _Line | None = None
        self._is_bent = False

    def __call__(self, rows: int) -> Step:
        if rows not in self._known:
            if rows > 1 and self._line is not None and rows <= _REACH * self._points[-1][0]:
                self._known[rows] = self._line.at(rows)
            else:
                self._known[rows] = self._simulate(rows)
                if rows > 1 and not self._is_bent:
                    self._learn(rows, self._known[rows])
        return self._known[rows]

    def _learn(self, rows: int, found: Step) -> None:
        """Draw the line, or hold what was `found` against it."""
        self._points.append((rows, found))
        if len(self._points) < 3:
            return
        first, *_, before, last = self._points
        self._is_bent = not _Line(*first, *before).holds(*last)
        self._line = None if self._is_bent else _Line(*first, *last)


@dataclass(frozen=True, slots=True)
class _Line:
    """The steps between and beyond two."""

    few: int
    one: Step
    many: int
    other: Step

    def holds(self, rows: int, found: Step) -> bool:
        """Whether `found` lies on the line."""
        try:
            return same(self.at(rows), found)
        except ValueError:
            return False

    def at(self, rows: int) -> Step:
        """The step of `rows` rows. Raises ValueError where the two do not do the same things in other sizes."""
        one, other = self.one, self.other
        known: dict[tuple[int, int], Events] = {}

        def events(a: Events, b: Events) -> Events:
            if (id(a), id(b)) not in known:  # blocks that do the same have one section
                known[id(a), id(b)] = self._events(a, b, rows)
            return known[id(a), id(b)]

        sections = zip(one.sections, other.sections, strict=True)
        groups = zip(one.kernels, other.kernels, strict=True)
        return Step(
            inputs=events(one.inputs, other.inputs),
            sections=tuple(events(a, b) for a, b in sections),
            end=events(one.end, other.end),
            choice=events(one.choice, other.choice),
            kernels=tuple(Kernels(a.times, self._kernels(a.kernels, b.kernels, rows)) for a, b in groups),
        )

    def _events(self, one: Events, other: Events, rows: int) -> Events:
        return tuple(
            a if a.nbytes is None or b.nbytes is None else Event(a.key, self._between(a.nbytes, b.nbytes, rows))
            for a, b in zip(one, other, strict=True)
        )

    def _kernels(self, one: tuple[Kernel, ...], other: tuple[Kernel, ...], rows: int) -> tuple[Kernel, ...]:
        return tuple(
            Kernel(
                self._between(a.flops, b.flops, rows), self._between(a.nbytes, b.nbytes, rows), a.operator, a.pattern
            )
            for a, b in zip(one, other, strict=True)
        )

    def _between(self, one: int, other: int, rows: int) -> int:
        return one + (other - one) * (rows - self.few) // (self.many - self.few)
