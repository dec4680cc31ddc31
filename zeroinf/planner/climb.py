"""Hill climbing with shrinking steps, for objectives without a gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

Spot = TypeVar("Spot")

_STEPS = (2.0, 1.25, 1.06, 1.015)


def climb(start: Spot, beside: Callable[[Spot, float], Iterable[Spot]], merit: Callable[[Spot], Any]) -> Spot:
    """The best spot that is reached from `start` by going on to a better one as long as there is one.

    `beside(spot, factor)` are the spots a step of that size away, which shrinks from twice to a hundredth. `merit` is
    asked for the same spots again and again.
    """
    best, most = start, merit(start)
    for step in _STEPS:
        while (better := next((spot for spot in beside(best, step) if merit(spot) > most), None)) is not None:
            best, most = better, merit(better)
    return best
