"""Passes that run out of GPU memory, against the plan: they are made again in smaller ones, and nothing is lost."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from generating import PlainEngine, run_rows
from generating import rows_of as made
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import build_model

from zeroinf.generation import micro_batch
from zeroinf.generation.pass_limits import Limits
from zeroinf.generation.row import Row

LENGTHS = (3, 9, 1, 6, 9, 2, 4, 9)
ROWS = 4


class TightEngine(PlainEngine):
    """Passes whose number is in `failing`, or with micro-batches of more than `most` rows, run out of memory."""

    def __init__(self, model: Any, *, failing: Sequence[int] = (), most: int = ROWS, recovers: bool = True) -> None:
        super().__init__(model)
        self.made: list[weakref.ref[torch.Tensor]] = []
        self._failing, self._most, self._recovers = failing, most, recovers

    def forward(self, micro_batches: Sequence[Mapping[str, Any]]) -> list[Any]:
        outputs = super().forward(micro_batches)
        self.asked.clear()
        self.made.append(weakref.ref(outputs[-1].logits))
        if max(self.rows) > self._most or len(self.passes) in self._failing:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return outputs

    @property
    def rows(self) -> list[int]:
        """Of each micro-batch of the last pass."""
        return [rows for rows, _ in self.passes[-1]]

    def recover(self) -> bool:
        return self._recovers


@pytest.fixture(scope="module")
def model() -> Any:
    return build_model("llama")


@pytest.fixture(scope="module")
def recurrent() -> Any:
    return build_model("lfm2")


def rows_of(**sampling: Any) -> list[Row]:
    return made([(3 + i, 9, 8)[: 1 + i % 3] * 3 for i in range(len(LENGTHS))], LENGTHS, ignore_eos=True, **sampling)


def run(engine: TightEngine, rows: Sequence[Row], *, draw: int = ROWS, **more: Any) -> tuple[list[Row], list[Limits]]:
    """The rows in the order in which they were given back, and what was told of smaller forwards."""
    ended, told = list[Row](), list[Limits]()
    run_rows(engine, rows, draw=draw, **{"rows": ROWS, "done": ended.append, "shrank": told.append, **more})
    return ended, told


def tokens_of(model: Any) -> list[list[int]]:
    rows = rows_of()
    run(TightEngine(model), rows)
    assert len({tuple(row.generated) for row in rows}) == len(rows)
    return [row.generated for row in rows]


@pytest.fixture(scope="module")
def expected(model: Any) -> list[list[int]]:
    return tokens_of(model)


@settings(max_examples=10, deadline=None)
@given(
    failing=st.lists(st.integers(1, 30), max_size=3, unique=True),
    draw=st.integers(1, 6),
    limits=st.sampled_from(
        [{}, {"micro_batch_rows": 2, "prefill_tokens": 5}, {"forward_tokens": 40}, {"forward_tokens": 3}]
    ),
)
def test_wherever_memory_runs_out_each_row_is_given_back_once_with_its_own_tokens(
    failing: list[int], draw: int, limits: dict[str, int], model: Any, expected: list[list[int]]
) -> None:
    rows, engine = rows_of(), TightEngine(model, failing=failing)
    try:
        ended, _ = run(engine, rows, draw=draw, **limits)
    except torch.OutOfMemoryError:
        assert max(engine.rows) == 1
        return
    assert sorted(row.index for row in ended) == list(range(len(rows)))
    assert [row.generated for row in rows] == expected
    assert [row.finish_reason for row in rows] == ["length"] * len(rows)


def test_micro_batches_are_halved_until_they_fit_and_stay_so(model: Any, expected: list[list[int]]) -> None:
    rows, engine = rows_of(), TightEngine(model, most=1)
    _, told = run(engine, rows)
    failed = [groups for groups in engine.passes if max(rows for rows, _ in groups) > 1]
    assert failed[:2] == [[(4, 9)], [(2, 9)]]
    assert len(told) == len(failed)
    assert told[-1].micro_batch_rows == 1
    assert [row.generated for row in rows] == expected


class FewTokens(TightEngine):
    """Forwards of more than `most` tokens, packed or padded, run out of memory."""

    @property
    def rows(self) -> list[int]:
        return [rows * tokens for rows, tokens in self.passes[-1]]


@pytest.mark.parametrize(
    ("limits", "steps"),
    [({}, [(ROWS, 1)]), ({"forward_tokens": 100}, [(1, ROWS)])],
    ids=["padded", "packed"],
)
def test_prompts_that_do_not_fit_are_halved_and_steps_of_all_rows_stay_in_one_forward(
    limits: dict[str, int], steps: list[tuple[int, int]], model: Any, expected: list[list[int]]
) -> None:
    rows, engine = rows_of(), FewTokens(model, most=6)
    _, told = run(engine, rows, **limits)
    assert [row.generated for row in rows] == expected
    assert {each.micro_batch_rows for each in told} == {ROWS}
    most = [max(rows * tokens for rows, tokens in groups) for groups in engine.passes]
    failed = len(told)
    assert min(most[:failed]) > 6 >= max(most[failed:])
    assert steps in engine.passes
    halves = [[(rows // 2, tokens // 2 or 1)] * 2 for rows, tokens in steps]
    assert not any(half in engine.passes for half in halves)


@pytest.mark.parametrize("limits", [{}, {"forward_tokens": 100}], ids=["padded", "packed"])
def test_steps_that_do_not_fit_are_halved_and_leave_prompts_as_large(
    limits: dict[str, int], model: Any, expected: list[list[int]]
) -> None:
    rows, engine = rows_of()[:4], TightEngine(model, failing=[2])
    _, told = run(engine, rows, **limits)
    assert [row.generated for row in rows] == expected[:4]
    (smaller,) = told
    assert smaller.micro_batch_rows == 2
    assert (smaller.forward_tokens or smaller.prefill_tokens) >= 21


def test_tokens_that_are_there_are_not_computed_again(model: Any, expected: list[list[int]]) -> None:
    rows, engine = rows_of()[:4], TightEngine(model, failing=[5])
    ended, told = run(engine, rows)
    assert [limits.micro_batch_rows for limits in told] == [1]
    assert [row.index for row in ended] == [2, 0, 3, 1]
    assert len(engine.passes) == 9 + 1
    assert [row.generated for row in rows] == expected[:4]


@pytest.mark.parametrize("limits", [{}, {"forward_tokens": 40}], ids=["padded", "packed"])
def test_states_that_a_failed_pass_has_changed_are_computed_anew(limits: dict[str, int], recurrent: Any) -> None:
    wanted = tokens_of(recurrent)
    rows, engine = rows_of(), TightEngine(recurrent, failing=[4, 9])
    ended, told = run(engine, rows, **limits)
    assert len(told) == 2
    assert sorted(row.index for row in ended) == list(range(len(rows)))
    assert [row.generated for row in rows] == wanted


def test_sampled_rows_draw_the_same_again(model: Any) -> None:
    sampling = {"temperature": 0.9, "seed": 3}
    at_ease, pressed = rows_of(**sampling), rows_of(**sampling)
    run(TightEngine(model), at_ease)
    _, told = run(TightEngine(model, failing=[2, 9]), pressed)
    assert len(told) == 2
    assert [row.generated for row in pressed] == [row.generated for row in at_ease]


def test_memory_that_runs_out_while_tokens_are_chosen_is_no_different(
    model: Any, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    choose, calls = micro_batch.choose_tokens, []

    def failing(scores: torch.Tensor, *given: Any) -> torch.Tensor:
        calls.append(len(scores))
        if len(calls) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return choose(scores, *given)

    monkeypatch.setattr(micro_batch, "choose_tokens", failing)
    rows = rows_of()
    ended, told = run(TightEngine(model), rows, micro_batch_rows=2)
    assert len(told) == 1
    assert sorted(row.index for row in ended) == list(range(len(rows)))
    assert [row.generated for row in rows] == expected


def test_what_a_failed_pass_had_made_is_gone_before_the_next_one(model: Any) -> None:
    engine, alive = TightEngine(model, failing=[2]), []
    run(engine, rows_of(), shrank=lambda rows: alive.append(engine.made[-1]() is not None))
    assert alive == [False]


def test_a_single_row_that_does_not_fit_ends_the_loop_with_what_was_finished(model: Any) -> None:
    rows, engine = rows_of(), TightEngine(model, failing=range(5, 60))
    with pytest.raises(torch.OutOfMemoryError):
        run(engine, rows)
    assert max(engine.rows) == 1
    assert [row.index for row in rows if row.finished] == [0, 2, 5]


def test_an_engine_that_cannot_go_on_is_not_asked_to(model: Any) -> None:
    engine = TightEngine(model, failing=[3], recovers=False)
    with pytest.raises(torch.OutOfMemoryError):
        run(engine, rows_of())
    assert len(engine.passes) == 3
