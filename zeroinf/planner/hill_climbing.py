"""Hill climbing with shrinking steps, for objectives without a gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

Point = TypeVar("Point")

_STEPS = (2.0, 1.25, 1.06, 1.015)


def climb(start: Point, beside: Callable[[Point, float], Iterable[Point]], merit: Callable[[Point], Any]) -> Point:
    """The best spot that is reached from `start` by going on to a better one as long as there is one.

    `beside(point, factor)` are the spots a step of that size away, which shrinks from twice to a hundredth. `merit` is
    asked for the same spots again and again.
    """
    best, most = start, merit(start)
    for step in _STEPS:
        while (better := next((point for point in beside(best, step) if merit(point) > most), None)) is not None:
            best, most = better, merit(better)
    return best
