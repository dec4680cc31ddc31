"""The stream engine after a pass that ran out of memory midway: the next one finds every block in its slot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from generating import rows_of, run_rows
from ranks import on_ranks
from test_stream_tokens import NEW_TOKENS, PROMPTS, plain_tokens

from zeroinf.distributed.control import Control
from zeroinf.distributed.world import World
from zeroinf.engines.stream.engine import StreamEngine
from zeroinf.generation.micro_batch import PaddedBatch
from zeroinf.generation.pass_limits import Limits
from zeroinf.model.inspect import find_blocks, read_anatomy
from zeroinf.model.resolve import resolve_model
from zeroinf.planner.plan import Plan

CPU = torch.device("cpu")
# While a micro-batch's inputs are made, before the first block, inside each of the three, and behind the last one.
WHERE = ("inputs", "embeddings", 0, 1, 2, "head")


def fail_once(model: Any, where: int | str, forward: int, patch: pytest.MonkeyPatch) -> None:
    """Let the `forward`-th forward of `model` run out of memory when it comes to that place."""
    if where == "inputs":
        fail_in_inputs(forward, patch)
        return
    _, blocks = find_blocks(model)
    places = {"embeddings": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    module = blocks[where].mlp if isinstance(where, int) else places[where]
    calls = []

    def hook(module: Any, inputs: Any) -> None:
        calls.append(None)
        if len(calls) == forward:
            raise torch.OutOfMemoryError("CUDA out of memory")

    module.register_forward_pre_hook(hook)


def fail_in_inputs(forward: int, patch: pytest.MonkeyPatch) -> None:
    make, calls = PaddedBatch.inputs, []

    def inputs(batch: PaddedBatch) -> dict[str, Any]:
        calls.append(None)
        if len(calls) == forward:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return make(batch)

    patch.setattr(PaddedBatch, "inputs", inputs)


def tokens_with_a_failure(
    control: Control, folder: Path, where: int | str | None, forward: int, *, rows: bool = True, **choice: Any
) -> tuple[list[list[int]], list[Limits]]:
    """This rank's tokens of PROMPTS, and what it was told of smaller forwards; fails nowhere where None."""
    control.world = replace(control.world, local_size=control.world.size)
    source = resolve_model(str(folder))
    plan = Plan(
        anatomy=read_anatomy(source.config, dtype="float32"),
        engine="stream",
        dtype="float32",
        device="cpu",
        world_size=control.world.size,
        batch_size=len(PROMPTS),
        **{"offload": "cpu", **choice},
    )
    engine = StreamEngine(plan, source, control, CPU)
    wanted, told = rows_of(PROMPTS if rows else [], NEW_TOKENS, ignore_eos=True), list[Limits]()
    try:
        with pytest.MonkeyPatch.context() as patch:
            if where is not None:
                fail_once(engine.model, where, forward, patch)
            run_rows(engine, wanted, control=control, shrank=told.append, prefill_tokens=20)
    finally:
        engine.close()
    return [row.generated for row in wanted], told


@pytest.mark.parametrize("forward", [1, 4])
@pytest.mark.parametrize("where", WHERE)
def test_tokens_after_a_lack_of_memory_are_those_of_plain_transformers(
    where: int | str, forward: int, small_checkpoint: Callable[[str], Path]
) -> None:
    folder = small_checkpoint("llama")
    tokens, told = tokens_with_a_failure(Control(World(), "cpu"), folder, where, forward)
    assert tokens == plain_tokens(folder)
    assert len(told) == 1


@pytest.mark.parametrize("choice", [{"resident_blocks": 1}, {"resident_blocks": 3, "offload": "none"}, {"nvme": 2}])
def test_a_lack_of_memory_leaves_every_tier_in_order(
    choice: dict[str, Any], small_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = small_checkpoint("llama")
    if nvme := choice.get("nvme"):
        choice = {"offload": "nvme", "nvme_blocks": nvme, "nvme_paths": (tmp_path,)}
    tokens, told = tokens_with_a_failure(Control(World(), "cpu"), folder, 1, 3, **choice)
    assert tokens == plain_tokens(folder)
    assert len(told) == 1


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("fetch", ["replicated", "partitioned"])
def test_a_rank_that_runs_out_of_memory_stays_in_step_with_the_other(
    fetch: str, where: int | str, small_checkpoint: Callable[[str], Path]
) -> None:
    folder = small_checkpoint("llama")

    def body(control: Control) -> Any:
        return tokens_with_a_failure(control, folder, where if control.world.rank == 1 else None, 4, fetch=fetch)

    found, _ = on_ranks(2, body)
    assert [tokens for tokens, _ in found] == [plain_tokens(folder)] * 2
    assert [len(told) for _, told in found] == [0, 1]


def test_a_rank_that_runs_out_of_memory_while_it_keeps_others_company_stays_in_step(
    small_checkpoint: Callable[[str], Path],
) -> None:
    folder = small_checkpoint("llama")

    def body(control: Control) -> Any:
        alone = control.world.rank == 1
        return tokens_with_a_failure(control, folder, 1 if alone else None, 3, rows=not alone, fetch="partitioned")

    found, _ = on_ranks(2, body)
    assert found == [(plain_tokens(folder), []), ([], [])]
