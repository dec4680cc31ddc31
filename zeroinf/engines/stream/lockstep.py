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

    `enter` is called with a block's index before its first use in a pass, `leave` after its last one. A forward that
    runs alone goes its plain way; several are greenlets, which change places before each block, and where one of them
    steps aside inside of a block.
    """

    def __init__(self, blocks: Sequence[Module], enter: Callable[[int], None], leave: Callable[[int], None]) -> None:
        self._blocks, self._enter, self._leave = len(blocks), enter, leave
        self._hub: greenlet | None = None
        self._inside = 0
        """Forwards that have yet to leave the block of this turn."""
        for index, block in enumerate(blocks):
            block.register_forward_pre_hook(self._before(index))
            block.register_forward_hook(self._after(index))

    def run(self, forwards: Sequence[Callable[[], Any]]) -> list[Any]:
        """Run `forwards` side by side and return their results; each must visit every block once, in order.

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
            for index in range(self._blocks):
                if any(at != index for at in waiting):
                    raise RuntimeError(f"a forward left block {index} out, or visited it out of order")
                self._inside = len(runners)
                self._enter(index)
                waiting = self._turn(runners)
            if not all(runner.dead for runner in runners):
                raise RuntimeError(f"a forward visits more than {self._blocks} blocks")
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

    def _before(self, index: int) -> Callable[..., None]:
        def wait(module: Module, inputs: Any) -> None:
            if self._hub is None:
                self._enter(index)
            else:
                self._hub.switch(index)

        return wait

    def _after(self, index: int) -> Callable[..., None]:
        def go_on(module: Module, inputs: Any, output: Any) -> None:
            self._inside -= 1
            if self._hub is None or not self._inside:
                self._leave(index)

        return go_on
