"""Forwards in lock-step: one walk over the blocks serves all, and whatever breaks one of them ends all."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import count as count_up
from typing import Any

import pytest
import torch
from greenlet import getcurrent
from small_models import build_model

from zeroinf.engines.stream.lockstep import LockStep, step_aside
from zeroinf.model.inspect import find_blocks

IDS = [torch.tensor([[5 + i, 6, 7 * i]]) for i in range(3)]


class Walk:
    """A model whose blocks note who runs them and when they are handed over."""

    def __init__(self, ahead: int = 0) -> None:
        self.model = build_model("llama")
        self.seen: list[str] = []
        blocks = list(find_blocks(self.model)[1])
        self.lock_step = LockStep(blocks, partial(self._note, "enter"), partial(self._note, "leave"), ahead=ahead)
        for block in blocks:
            block.mlp.register_forward_pre_hook(lambda *ignored: self.seen.append("run"))

    def _note(self, what: str, block: int) -> None:
        self.seen.append(f"{what} {block}")

    def forwards(self) -> list[Callable[[], Any]]:
        return [partial(self.model, input_ids=ids) for ids in IDS]

    def run(self, forwards: list[Callable[[], Any]]) -> list[Any]:
        with torch.inference_mode():
            return self.lock_step.run(forwards)


@pytest.fixture
def walk() -> Walk:
    return Walk()


@pytest.mark.parametrize("count", [1, 3])
def test_one_walk_serves_every_forward(walk: Walk, count: int) -> None:
    outputs = walk.run(walk.forwards()[:count])
    assert walk.seen == [
        f"{what} {i}" if what else "run" for i in range(3) for what in ["enter", *[""] * count, "leave"]
    ]
    for ids, output in zip(IDS, outputs, strict=False):
        assert torch.equal(output.logits, walk.run([partial(walk.model, input_ids=ids)])[0].logits)


@pytest.mark.parametrize("count", [1, 3])
def test_a_forward_that_steps_aside_lets_the_others_of_its_block_go_first(walk: Walk, count: int) -> None:
    plain = [output.logits for output in walk.run(walk.forwards()[:count])]
    turns = count_up()

    def attend(*ignored: Any) -> None:
        number = next(turns) % count
        walk.seen.append(f"ask {number}")
        for _ in range(2 if number == 0 else 0):
            step_aside()
        walk.seen.append(f"go on {number}")

    for block in find_blocks(walk.model)[1]:
        block.self_attn.register_forward_pre_hook(attend)
    walk.seen.clear()
    outputs = walk.run(walk.forwards()[:count])
    assert all(torch.equal(output.logits, before) for output, before in zip(outputs, plain, strict=True))
    others = [what for number in range(1, count) for what in (f"ask {number}", f"go on {number}", "run")]
    one = [["enter", "ask 0", *others, "go on 0", "run", "leave"]] * 3
    assert walk.seen == [
        f"{what} {index}" if what in ("enter", "leave") else what for index, turn in enumerate(one) for what in turn
    ]


def test_of_two_that_step_aside_one_is_a_block_ahead_while_the_other_waits() -> None:
    walk, names = Walk(ahead=1), dict[Any, str]()
    plain = [output.logits for output in walk.run(walk.forwards())]

    def attend(*ignored: Any) -> None:
        name = names.setdefault(getcurrent(), "abc"[len(names) % 3])
        if name != "c":
            walk.seen.append(f"{name} asks")
            step_aside()
        walk.seen.append(f"{name} goes on")

    for block in find_blocks(walk.model)[1]:
        block.self_attn.register_forward_pre_hook(attend)
    walk.seen.clear()
    outputs = walk.run(walk.forwards())
    assert all(torch.equal(output.logits, before) for output, before in zip(outputs, plain, strict=True))
    between = [
        ["a goes on", "run", f"enter {block}", "a asks", "b goes on", "run", f"leave {block - 1}", "b asks"]
        for block in (1, 2)
    ]
    ends = ["a goes on", "run", "b goes on", "run"]
    first, *others = (["c goes on", "run"] for _ in range(3))
    assert walk.seen == [
        "enter 0",
        "a asks",
        "b asks",
        *first,
        *between[0],
        *others[0],
        *between[1],
        *others[1],
        *ends,
        "leave 2",
    ]


@pytest.mark.parametrize("block", [0, 2])
@pytest.mark.parametrize("number", [0, 2])
def test_what_one_forward_raises_is_raised_and_the_others_are_ended(walk: Walk, number: int, block: int) -> None:
    ended: list[int] = []

    def watched(index: int, forward: Callable[[], Any]) -> Any:
        try:
            return forward()
        finally:
            ended.append(index)

    def break_down(module: Any, inputs: Any) -> None:
        calls.append(None)
        if len(calls) == number + 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    calls: list[None] = []
    hook = find_blocks(walk.model)[1][block].mlp.register_forward_pre_hook(break_down)
    with pytest.raises(torch.OutOfMemoryError):
        walk.run([partial(watched, index, forward) for index, forward in enumerate(walk.forwards())])
    assert sorted(ended) == [0, 1, 2]
    assert f"enter {block}" in walk.seen
    assert f"leave {block}" not in walk.seen
    hook.remove()
    walk.seen.clear()
    walk.run(walk.forwards())
    assert walk.seen.count("run") == 9


def test_a_forward_that_leaves_blocks_out_is_refused(walk: Walk) -> None:
    with pytest.raises(RuntimeError, match="a forward left block 0 out"):
        walk.run([*walk.forwards(), lambda: None])


def test_a_forward_that_visits_blocks_again_is_refused(walk: Walk) -> None:
    def twice(forward: Callable[[], Any]) -> Any:
        return forward(), forward()

    with pytest.raises(RuntimeError, match="visits more than 3 blocks"):
        walk.run([partial(twice, forward) for forward in walk.forwards()])
