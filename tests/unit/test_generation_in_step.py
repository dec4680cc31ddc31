"""Ranks whose forwards are collectives make the same number of them, whatever work each has."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from generating import run_rows
from ranks import on_ranks
from small_models import build_model

from zeroinf.distributed.control import Control
from zeroinf.distributed.world import World
from zeroinf.engines.base import EngineStats
from zeroinf.generation.micro_batch import MicroBatch
from zeroinf.generation.row import Row, Sampling
from zeroinf.runs.queue import WorkQueue

LENGTHS = (9, 1, 4, 17, 2, 2, 6, 1, 1, 12, 3)
STOPPED = 15


class CollectiveEngine:
    """A transformers model; on several ranks each forward waits for those of the others, and odd ranks are slow."""

    name = "collective"
    in_step = shares_passes = True
    link_stream = None

    def __init__(self, model: Any, control: Control) -> None:
        self.model = model
        self.forwards = 0
        self._world = control.world

    def forward(self, micro_batches: Sequence[Mapping[str, Any]]) -> list[Any]:
        self.forwards += 1
        if self._world.size > 1:
            time.sleep(0.003 * (self._world.rank % 2))
            dist.barrier()
        with torch.no_grad():
            return [self.model(**inputs) for inputs in micro_batches]

    def stats(self) -> EngineStats:
        return EngineStats(passes=self.forwards, streamed_bytes_per_pass=0)

    def close(self) -> None: ...


@pytest.fixture(scope="module")
def model() -> Any:
    """Its end tokens are some that rows meet on their way, early or late."""
    made = build_model("llama")
    made.generation_config.eos_token_id = None
    free = tokens_of(run(Control(World(), "cpu"), made, batch=4))
    made.generation_config.eos_token_id = [free[3][7], free[7][0]]
    return made


def run(
    control: Control, model: Any, *, batch: int, stop_after: int | None = None, **sampling: Any
) -> tuple[int, int, dict[int, list[int]]]:
    """What `generate` returned on this rank, its number of forwards, and the tokens of the rows that it took."""
    rows = [
        Row(index=i, prompt=(3 + i,) * (1 + i % 3), sampling=Sampling(max_new_tokens=n, **sampling), decode=str)
        for i, n in enumerate(LENGTHS)
    ]
    engine, queue, ended = CollectiveEngine(model, control), WorkQueue(control.store, len(rows), batch), []
    stopped, _ = run_rows(
        engine,
        rows,
        control=control,
        rows=batch,
        take=lambda: [rows[i] for i in queue.draw()],
        done=ended.append,
        stop_requested=lambda: STOPPED if stop_after is not None and engine.forwards >= stop_after else 0,
    )
    return stopped, engine.forwards, {row.index: row.generated for row in ended}


def tokens_of(*ranks: tuple[int, int, dict[int, list[int]]]) -> dict[int, list[int]]:
    return {index: tokens for _, _, rows in ranks for index, tokens in rows.items()}


@pytest.mark.parametrize("ignore_eos", [True, False])
@pytest.mark.parametrize(("ranks", "batch"), [(2, 1), (2, 2), (3, 3), (3, 8)])
def test_uneven_work_ends_on_all_ranks_after_the_same_forwards(
    ranks: int, batch: int, ignore_eos: bool, model: Any
) -> None:
    found, _ = on_ranks(ranks, lambda control: run(control, model, batch=batch, ignore_eos=ignore_eos))
    assert [stopped for stopped, _, _ in found] == [0] * ranks
    assert len({forwards for _, forwards, _ in found}) == 1
    alone = run(Control(World(), "cpu"), model, batch=batch, ignore_eos=ignore_eos)
    assert tokens_of(*found) == tokens_of(alone)
    assert sum(len(rows) for _, _, rows in found) == len(LENGTHS)
    assert (max(map(len, tokens_of(*found).values())) == max(LENGTHS)) == ignore_eos


@pytest.mark.parametrize("asked", [0, 1, 5])
def test_a_stop_on_one_rank_ends_all_on_the_same_forward_within_two(asked: int, model: Any) -> None:
    def body(control: Control) -> Any:
        return run(control, model, batch=2, stop_after=asked if control.world.rank == 1 else None, ignore_eos=True)

    found, _ = on_ranks(2, body)
    assert [stopped for stopped, _, _ in found] == [STOPPED] * 2
    ((_, first, _), (_, second, _)) = found
    assert asked <= first == second <= asked + 2


@pytest.mark.parametrize("failing", [1, 6])
def test_memory_that_runs_out_before_a_forward_costs_no_rank_its_step_even_where_an_engine_cannot_recover(
    failing: int, model: Any
) -> None:
    def body(control: Control) -> Any:
        make, calls = MicroBatch.inputs, []

        def inputs(batch: MicroBatch) -> dict[str, Any]:
            calls.append(None)
            if control.world.rank == 1 and len(calls) == failing:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return make(batch)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(MicroBatch, "inputs", inputs)
            return run(control, model, batch=3, ignore_eos=True)

    found, _ = on_ranks(2, body)
    assert [stopped for stopped, _, _ in found] == [0, 0]
    assert found[0][1] == found[1][1]
    assert tokens_of(*found) == tokens_of(run(Control(World(), "cpu"), model, batch=3, ignore_eos=True))
