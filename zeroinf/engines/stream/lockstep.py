"""Runs several forwards in lock-step: every forward runs block i before any forward runs block i + 1.

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


def step_aside() -> None:
    """Let the other forwards go on in the block that this one is in, and be resumed after them. Nothing happens where
    a forward runs alone. To be called inside of a block."""
    current = getcurrent()
    if isinstance(current, _Forward):
        current.parent.switch(_ASIDE)


class LockStep:
    """Forward hooks on `blocks` that take them in step: block i serves every forward before block i + 1 serves any.

    A pass visits so many `units`: each block is one, at the place that `first` gives, and is followed by those inside
    of it, such as parts of its experts, which count as blocks and call `reach` and `done` themselves. `enter` is called
    with a unit before its first use in a pass, `leave` after its last one; that of a block comes after those inside. A
    forward that runs alone goes its plain way; several are greenlets, which change places before each unit, and where
    one of them steps aside inside of a block.
    """

    def __init__(
        self,
        blocks: Sequence[Module],
        enter: Callable[[int], None],
        leave: Callable[[int], None],
        first: Sequence[int] | None = None,
        units: int | None = None,
    ) -> None:
        """Without `first` and `units` there is nothing inside of blocks."""
        self._units, self._enter, self._leave = len(blocks) if units is None else units, enter, leave
        self._hub: greenlet | None = None
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

        runners = [_Forward(body, getcurrent()) for _ in forwards]
        self._hub = getcurrent()
        try:
            waiting = [self._start(runner, number) for number, runner in enumerate(runners)]
            for index in range(self._units) if units is None else units:
                if any(at != index for at in waiting):
                    raise RuntimeError(f"a forward left block {index} out, or visited it out of order")
                self._inside[index] = len(runners)
                self._enter(index)
                waiting = self._turn(runners)
            if not all(runner.dead for runner in runners):
                raise RuntimeError(f"a forward visits more than {self._units} blocks")
        finally:
            self._hub = None
            for runner in runners:
                if runner:
                    runner.throw()
        return results

    @staticmethod
    def _turn(runners: Sequence[greenlet]) -> list[Any]:
        """Let each of `runners` go through one block, those that step aside after the others."""
        found: dict[greenlet, Any] = dict.fromkeys(runners, _ASIDE)
        while aside := [runner for runner, reached in found.items() if reached is _ASIDE]:
            for runner in aside:
                found[runner] = runner.switch()
        return list(found.values())

    @staticmethod
    def _start(runner: greenlet, number: int) -> Any:
        runner.gr_context = copy_context()
        return runner.switch(number)

    def reach(self, unit: int) -> None:
        """The current forward needs `unit`: it goes on once all have come that far."""
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
