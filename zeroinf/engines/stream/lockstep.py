"""Runs several forwards in lock-step: every forward runs block i before any forward runs block i + 1, or, where they
wait inside of blocks for what others compute meanwhile, one block later.

Forward pre-hooks switch between greenlets at block boundaries. The forwards themselves are unmodified.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import copy_context
from typing import Any

from greenlet import getcurrent, greenlet
from torch.nn import Module

_ASIDE = "aside"


class _Forward(greenlet):  # type: ignore[misc]
    """A forward that runs in step with others."""

    place = 0
    """How many units of the pass it has begun to wait for, less one: that of the unit it waits for or is in."""
    is_aside = False


def step_aside() -> None:
    """Let the other forwards have their turns, and be resumed after them. Nothing happens where a forward runs alone.
    To be called inside of a block."""
    current = getcurrent()
    if isinstance(current, _Forward):
        current.parent.switch(_ASIDE)


class LockStep:
    """Forward hooks on `blocks` that take them in step: block i serves every forward before block i + 1 serves any.

    A pass visits so many `units`: each block is one, at the place that `first` gives, and is followed by those inside
    of it, such as parts of its experts, which count as blocks and call `reach` and `done` themselves. `enter` is called
    with a unit before its first use in a pass, `leave` after its last one; that of a block comes after those inside. A
    forward that runs alone goes its plain way; several are greenlets, which take turns in their order. A turn ends
    before a unit, and where a forward steps aside inside of a block; one that stood aside goes on until it does so
    again. With `ahead`, a unit may be entered while forwards that stand aside have yet to leave so many before it.
    """

    def __init__(
        self,
        blocks: Sequence[Module],
        enter: Callable[[int], None],
        leave: Callable[[int], None],
        first: Sequence[int] | None = None,
        units: int | None = None,
        ahead: int = 0,
    ) -> None:
        """Without `first` and `units` there is nothing inside of blocks."""
        self._all, self._enter, self._leave = range(len(blocks) if units is None else units), enter, leave
        self._ahead = ahead
        self._hub: greenlet | None = None
        self._forwards: list[_Forward] = []
        self._visited: Sequence[int] = ()
        """The units of the pass that runs."""
        self._inside: dict[int, int] = {}
        """Forwards that have yet to use a unit that has been entered."""
        for unit, block in zip(range(len(blocks)) if first is None else first, blocks, strict=True):
            block.register_forward_pre_hook(self._before(unit))
            block.register_forward_hook(self._after(unit))

    def run(self, forwards: Sequence[Callable[[], Any]], units: Sequence[int] | None = None) -> list[Any]:
        """Run `forwards` side by side and return their results; each must visit every unit, or each of `units`, once,
        in order.

        What one of them raises is raised here, after the others have been ended where they stood.
        """
        if len(forwards) == 1:
            return [forwards[0]()]
        results: list[Any] = [None] * len(forwards)

        def body(number: int) -> None:
            results[number] = forwards[number]()

        self._hub, self._visited = getcurrent(), self._all if units is None else units
        self._inside.clear()
        self._forwards = [_Forward(body, self._hub) for _ in forwards]
        try:
            for number, one in enumerate(self._forwards):
                one.gr_context = copy_context()
                self._check(one, one.switch(number))
            while not all(one.dead for one in self._forwards):
                for one in self._forwards:
                    if not one.dead:
                        self._take_turn(one)
        finally:
            self._hub = None
            for one in self._forwards:
                if one:
                    one.throw()
            self._forwards = []
        return results

    def _take_turn(self, one: _Forward) -> None:
        """Let a forward go through a unit, if it may; or on from where it stood aside, and into the next block."""
        stood_aside = one.is_aside
        if stood_aside:
            self._resume(one)
        if not (one.dead or one.is_aside) and self._lets_in(one):
            self._resume(one)

    def _resume(self, one: _Forward) -> None:
        reached = one.switch()
        one.is_aside = reached is _ASIDE
        if not one.is_aside:
            one.place += 1
            self._check(one, reached)

    def _check(self, one: _Forward, reached: int | None) -> None:
        """A forward comes to a unit, or to its end: it must be the next one."""
        if one.place == len(self._visited):
            if not one.dead:
                raise RuntimeError(f"a forward visits more than {len(self._all)} blocks")
        elif one.dead or reached != self._visited[one.place]:
            unit = self._visited[one.place]
            raise RuntimeError(f"a forward left block {unit} out, or visited it out of order")

    def _lets_in(self, one: _Forward) -> bool:
        """Whether a forward may use the unit that it waits for, which is entered then."""
        unit = self._visited[one.place]
        if unit not in self._inside:
            if any(other.place < one.place - self._ahead for other in self._forwards):
                return False
            self._inside[unit] = len(self._forwards)
            self._enter(unit)
        return True

    def reach(self, unit: int) -> None:
        """The current forward needs `unit`: it goes on once the others have come far enough."""
        if self._hub is None:
            self._enter(unit)
        else:
            self._hub.switch(unit)

    def done(self, unit: int) -> None:
        """The current forward has used `unit`."""
        if self._hub is not None:
            self._inside[unit] -= 1
        if self._hub is None or not self._inside[unit]:
            self._leave(unit)

    def _before(self, unit: int) -> Callable[..., None]:
        return lambda module, inputs: self.reach(unit)

    def _after(self, unit: int) -> Callable[..., None]:
        return lambda module, inputs, output: self.done(unit)
