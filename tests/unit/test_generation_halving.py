"""Micro-batches that run out of GPU memory, against the plan: rows run again in smaller ones, and nothing is lost."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import PAD, build_model

from zeroinf.distributed.control import Control
from zeroinf.distributed.world import World
from zeroinf.engines.base import EngineStats
from zeroinf.generation import micro_batch
from zeroinf.generation.cache import CachePool
from zeroinf.generation.loop import generate
from zeroinf.generation.micro_batch import TokenRules
from zeroinf.generation.row import Row, Sampling
from zeroinf.model.inspect import read_anatomy

CPU = torch.device("cpu")
LENGTHS = (3, 9, 1, 6, 9, 2, 4, 9)
ROWS = 4


class TightEngine:
    """A transformers model; forwards whose number is in `failing`, or of more than `most` rows, run out of memory."""

    name = "tight"
    in_step = False

    def __init__(self, model: Any, *, failing: Sequence[int] = (), most: int = ROWS, recovers: bool = True) -> None:
        self.model = model
        self.rows: list[int] = []
        self.made: list[weakref.ref[torch.Tensor]] = []
        self._failing, self._most, self._recovers = failing, most, recovers

    def forward(self, micro_batches: Sequence[Mapping[str, Any]]) -> list[Any]:
        (inputs,) = micro_batches
        self.rows.append(len(inputs["input_ids"]))
        with torch.no_grad():
            output = self.model(**inputs)
        self.made.append(weakref.ref(output.logits))
        if self.rows[-1] > self._most or len(self.rows) in self._failing:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return [output]

    def recover(self) -> bool:
        return self._recovers

    def stats(self) -> EngineStats:
        return EngineStats(passes=len(self.rows), streamed_bytes_per_pass=0)

    def close(self) -> None: ...


@pytest.fixture(scope="module")
def model() -> Any:
    return build_model("llama")


def rows_of(**sampling: Any) -> list[Row]:
    """Rows of one prompt length: then what shares a micro-batch does not change a row's scores."""
    return [
        Row(index=i, prompt=(3 + i, 9, 8), sampling=Sampling(max_new_tokens=n, ignore_eos=True, **sampling), decode=str)
        for i, n in enumerate(LENGTHS)
    ]


def run(engine: TightEngine, rows: Sequence[Row], *, draw: int = ROWS, **more: Any) -> tuple[list[Row], list[int]]:
    """The rows in the order in which they were given back, and what was told of smaller micro-batches."""
    left, ended, told = list(rows), [], []
    pool = CachePool(engine.model, read_anatomy(engine.model.config), rows=ROWS, tokens=12, device=CPU)

    def take() -> list[Row]:
        taken = left[:draw]
        del left[:draw]
        return taken

    stopped = generate(
        engine,
        TokenRules(engine.model, PAD, ()),
        Control(World(), "cpu"),
        pool,
        CPU,
        take=take,
        done=ended.append,
        shrank=more.get("shrank", told.append),
    )
    assert stopped == 0
    return ended, told


@pytest.fixture(scope="module")
def expected(model: Any) -> list[list[int]]:
    rows = rows_of()
    run(TightEngine(model), rows)
    assert len({tuple(row.generated) for row in rows}) == len(rows)
    return [row.generated for row in rows]


@settings(max_examples=30)
@given(failing=st.lists(st.integers(1, 30), max_size=3, unique=True), draw=st.integers(1, 6))
def test_wherever_memory_runs_out_each_row_is_given_back_once_with_its_own_tokens(
    failing: list[int], draw: int, model: Any, expected: list[list[int]]
) -> None:
    rows, engine = rows_of(), TightEngine(model, failing=failing)
    try:
        ended, _ = run(engine, rows, draw=draw)
    except torch.OutOfMemoryError:
        assert engine.rows[-1] == 1
        return
    assert sorted(row.index for row in ended) == list(range(len(rows)))
    assert [row.generated for row in rows] == expected
    assert [row.finish_reason for row in rows] == ["length"] * len(rows)


def test_micro_batches_are_halved_until_they_fit_and_stay_so(model: Any, expected: list[list[int]]) -> None:
    rows, engine = rows_of(), TightEngine(model, most=1)
    _, told = run(engine, rows)
    assert told == [2, 1]
    assert engine.rows[:3] == [4, 2, 1]
    assert set(engine.rows[2:]) == {1}
    assert [row.generated for row in rows] == expected


def test_a_row_that_had_ended_does_not_run_again(model: Any, expected: list[list[int]]) -> None:
    rows, engine = rows_of()[:4], TightEngine(model, failing=[5])
    ended, told = run(engine, rows)
    assert told == [2]
    assert [row.index for row in ended] == [2, 0, 3, 1], "two had ended when the fifth forward failed"
    assert engine.rows == [4] * 5 + [2] * 9
    assert [row.generated for row in rows] == expected[:4]


def test_sampled_rows_draw_the_same_again(model: Any) -> None:
    sampling = {"temperature": 0.9, "seed": 3}
    at_ease, pressed = rows_of(**sampling), rows_of(**sampling)
    run(TightEngine(model), at_ease)
    _, told = run(TightEngine(model, failing=[4, 9]), pressed)
    assert told == [2, 1]
    assert [row.generated for row in pressed] == [row.generated for row in at_ease]


def test_memory_that_runs_out_while_tokens_are_chosen_is_no_different(
    model: Any, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    choose, calls = micro_batch.choose_tokens, []

    def failing(scores: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
        calls.append(len(rows))
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return choose(scores, rows)

    monkeypatch.setattr(micro_batch, "choose_tokens", failing)
    rows = rows_of()
    ended, told = run(TightEngine(model), rows)
    assert told == [2]
    assert sorted(row.index for row in ended) == list(range(len(rows)))
    assert [row.generated for row in rows] == expected


def test_memory_that_runs_out_before_the_first_forward_is_no_different(
    model: Any, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    lend, calls = CachePool.lend, []

    def failing(self: CachePool, rows: int, tokens: int) -> Any:
        calls.append(rows)
        if len(calls) in (1, 3):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return lend(self, rows, tokens)

    monkeypatch.setattr(CachePool, "lend", failing)
    rows = rows_of()
    _, told = run(TightEngine(model), rows)
    assert told == [2, 1]
    assert calls[:4] == [4, 2, 2, 1]
    assert [row.generated for row in rows] == expected


def test_what_a_failed_forward_had_made_is_gone_before_less_is_allocated(model: Any) -> None:
    engine, alive = TightEngine(model, failing=[2]), []
    run(engine, rows_of(), shrank=lambda rows: alive.append(engine.made[-1]() is not None))
    assert alive == [False]


def test_a_last_micro_batch_of_one_row_has_the_cache_of_one_row_before_it_is_given_up(model: Any) -> None:
    rows, engine = rows_of()[:1], TightEngine(model, failing=[1])
    _, told = run(engine, rows)
    assert told == [1]
    assert rows[0].finished


def test_a_single_row_that_does_not_fit_ends_the_loop_with_what_was_finished(model: Any) -> None:
    rows, engine = rows_of(), TightEngine(model, failing=[5, 6, 7])
    with pytest.raises(torch.OutOfMemoryError):
        run(engine, rows)
    assert engine.rows == [4] * 5 + [2, 1]
    assert [row.index for row in rows if row.finished] == [0, 2]


def test_an_engine_that_cannot_go_on_is_not_asked_to(model: Any) -> None:
    engine = TightEngine(model, failing=[3], recovers=False)
    with pytest.raises(torch.OutOfMemoryError):
        run(engine, rows_of())
    assert engine.rows == [4, 4, 4]
