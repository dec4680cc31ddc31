"""Interpolates micro-batches of any number of rows from a few that were simulated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter

from zeroinf.planner.allocator import Event, Events
from zeroinf.planner.pass_shapes import MOST_MICRO_BATCH_ROWS
from zeroinf.planner.workload import Kernel, Kernels, Pass, Step, same

# The line is not followed further than this many times the most rows that were found to lie on it.
_REACH = 8


class ByRows:
    """Answers for `simulate`, which gives the steps of a micro-batch one after the other, but asks it for a few numbers
    of rows only.

    All that a micro-batch allocates, reads and computes is a straight line in its rows: the first two that are asked
    for give it, and the largest micro-batch must lie on it to the byte. Where it does not, every number of rows is
    simulated. One row is a case of its own: nothing is padded there.
    """

    def __init__(self, simulate: Callable[[int], Pass], most: int = MOST_MICRO_BATCH_ROWS) -> None:
        """`most`: it is not asked for more rows, or they are no straight line."""
        self._simulate, self._largest = simulate, most
        self._known: dict[int, Pass] = {}
        self._points: list[tuple[int, Pass]] = []
        self._line: _Line | None = None
        self._is_bent = False

    def __call__(self, rows: int) -> Pass:
        if rows not in self._known:
            if rows > 1 and len(self._points) == 2 and max(rows, self._most) < self._largest:
                self._learn(self._largest)
            if rows > 1 and self._line is not None and rows <= _REACH * self._most:
                self._known[rows] = self._line.at(rows)
            elif rows > 1 and not self._is_bent:
                self._learn(rows)
            else:
                self._known[rows] = self._simulate(rows)
        return self._known[rows]

    @property
    def _most(self) -> int:
        return self._points[-1][0]

    def _learn(self, rows: int) -> None:
        """Simulate so many rows; draw the line between the fewest and the most, and hold the others against it."""
        self._known[rows] = found = self._simulate(rows)
        self._points = sorted([*self._points, (rows, found)], key=itemgetter(0))
        if len(self._points) < 3:
            return
        first, *between, last = self._points
        line = _Line(*first, *last)
        self._is_bent = not all(line.holds(*each) for each in between)
        self._line = None if self._is_bent else line


@dataclass(frozen=True, slots=True)
class _Line:
    """The steps between and beyond those of two numbers of rows."""

    few: int
    some: Pass
    many: int
    others: Pass

    def holds(self, rows: int, found: Pass) -> bool:
        """Whether `found` lies on the line."""
        try:
            return all(same(*each) for each in zip(self.at(rows), found, strict=True))
        except ValueError:
            return False

    def at(self, rows: int) -> Pass:
        """The steps of `rows` rows. Raises ValueError where the two do not do the same things in other sizes."""
        return tuple(self._step(*each, rows) for each in zip(self.some, self.others, strict=True))

    def _step(self, one: Step, other: Step, rows: int) -> Step:
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
