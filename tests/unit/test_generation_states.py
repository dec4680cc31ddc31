"""Rows of models with recurrent layers come and go like others, and each gets the tokens that it gets alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from generating import PlainEngine, anatomy_of, greedy_by_transformers, rows_of, run_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import RECURRENT_MODELS, build_model
from tiers import tiered

from zeroinf.generation import states
from zeroinf.generation.row import Row
from zeroinf.generation.states import CallLimits, pieces_of

PADDED = {"rows": 4, "micro_batch_rows": 3, "prefill_tokens": 16}
"""A prompt of more tokens is computed in parts."""
PACKED = {"rows": 4, "micro_batch_rows": 4, "prefill_tokens": 24, "forward_tokens": 11}
USUAL = ("falcon_h1", "jamba", "lfm2", "nemotron_h", "qwen3_next")


def rows_by_chance(seed: int, count: int = 9) -> list[Row]:
    """Prompts and completions of unlike lengths, some of them alike."""
    chance = random.Random(seed)
    prompts = [[chance.randrange(3, 380) for _ in range(chance.choice((1, 2, 9, 9, 23, 40)))] for _ in range(count)]
    return rows_of(prompts, [chance.choice((1, 3, 6, 8)) for _ in prompts], ignore_eos=True)


def check(model: Any, rows: Sequence[Row]) -> None:
    for row in rows:
        assert row.generated == greedy_by_transformers(model, row.prompt, row.generated), row.index


@pytest.mark.parametrize("name", tiered(RECURRENT_MODELS, USUAL))
def test_tokens_are_those_of_each_row_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states, "_TOKENS_AT_ONCE", 16)
    model = build_model(name)
    for limits in (PADDED, PACKED):
        if limits is PACKED and anatomy_of(model).padded_because:
            assert name == "kimi_linear"  # whose latent keys are expanded after they are cached
            continue
        rows, engine = rows_by_chance(1), PlainEngine(model)
        run_rows(engine, rows, draw=2, **limits)
        assert [len(row.generated) for row in rows] == [row.sampling.max_new_tokens for row in rows]
        check(model, rows)


def test_rows_enter_while_others_are_on_their_way() -> None:
    model = build_model("qwen3_next")
    engine = PlainEngine(model)
    rows = rows_of([[5, 6, 7]] * 6, [2, 9, 2, 2, 2, 2], ignore_eos=True)
    run_rows(engine, rows, rows=2)
    assert len(engine.passes) < 9 + 2, "the long row kept a place from the others"
    check(model, rows)


@pytest.mark.parametrize("limits", [PADDED, PACKED], ids=["padded", "packed"])
@pytest.mark.parametrize("name", ["qwen3_next", "jamba"])
def test_cancelled_rows_leave_nothing_to_those_that_follow(name: str, limits: dict[str, int]) -> None:
    model, rows = build_model(name), rows_by_chance(2)
    passes, unwanted = 0, list[Row]()

    def cancelled() -> list[Row]:
        nonlocal passes
        passes += 1
        if passes % 3:
            return []
        unwanted.extend(row for row in rows[:: 2 + passes] if row not in unwanted and not row.finished)
        return unwanted

    run_rows(PlainEngine(model), rows, draw=3, cancelled=cancelled, **limits)
    assert unwanted
    check(model, [row for row in rows if row.generated])


class Breaking(PlainEngine):
    """Passes of some numbers run out of memory in the last layer of their last micro-batch."""

    def __init__(self, model: Any, breaks: Sequence[int]) -> None:
        super().__init__(model)
        self._breaks, self._left = breaks, 0
        model.model.layers[-1].register_forward_pre_hook(self._may_break)

    def _may_break(self, *ignored: Any) -> None:
        self._left -= 1
        if not self._left and len(self.passes) in self._breaks:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def forward(self, micro_batches: Sequence[Any]) -> list[Any]:
        self._left = len(micro_batches)
        return super().forward(micro_batches)


@pytest.mark.parametrize("limits", [PADDED, PACKED, {"rows": 4}], ids=["padded", "packed", "whole"])
@pytest.mark.parametrize("name", ["qwen3_next", "jamba"])
def test_a_pass_that_breaks_between_layers_changes_no_row(name: str, limits: dict[str, int]) -> None:
    model, rows = build_model(name), rows_by_chance(3)
    engine = Breaking(model, (2, 5))
    run_rows(engine, rows, draw=4, **limits)
    engine._breaks = ()
    check(model, rows)


@pytest.mark.parametrize("kv_dtype", ["model", "int8"])
def test_states_stay_on_the_gpu_where_keys_rest_in_host_memory(kv_dtype: Any) -> None:
    model, rows = build_model("falcon_h1"), rows_by_chance(4)
    run_rows(PlainEngine(model), rows, draw=3, **PADDED, pages=8, host_tokens=200, kv_dtype=kv_dtype)
    assert all(len(row.generated) == row.sampling.max_new_tokens for row in rows)
    if kv_dtype == "model":
        check(model, rows)


def test_rows_of_an_engine_that_shares_no_passes_start_together() -> None:
    model, rows = build_model("lfm2"), rows_by_chance(5)
    run_rows(PlainEngine(model, shares_passes=False), rows, draw=4, rows=4)
    check(model, rows)


@settings(max_examples=200, deadline=None)
@given(
    counts=st.lists(st.integers(1, 90), min_size=1, max_size=12),
    tokens=st.integers(1, 64),
    rows=st.integers(1, 12),
    chunk=st.sampled_from((1, 4, 16)),
    continues=st.booleans(),
)
def test_calls_cover_every_token_once_in_order_and_within_their_limits(
    counts: list[int], tokens: int, rows: int, chunk: int, continues: bool
) -> None:
    limits = CallLimits(tokens=tokens, rows=rows, chunk_tokens=chunk, continues=continues)
    firsts = [sum(counts[:row]) for row in range(len(counts))]
    done = list(firsts)
    for piece in pieces_of(firsts, counts, limits):
        assert len(piece.rows) <= rows
        assert len(piece.rows) == 1 or piece.count == 1 or len(piece.rows) * piece.count <= tokens
        assert piece.count <= tokens or not continues
        for row, start in zip(piece.rows, piece.starts, strict=True):
            assert start == done[row]
            assert continues or piece.count == counts[row]
            done[row] += piece.count
    assert done == [first + count for first, count in zip(firsts, counts, strict=True)]


def test_prompts_of_many_lengths_take_fewer_calls_than_there_are_prompts() -> None:
    limits = CallLimits(tokens=1024, rows=64, chunk_tokens=16, continues=True)
    counts = list(range(20, 52))
    assert len(pieces_of([0] * len(counts), counts, limits)) < len(counts) / 2
    assert len(pieces_of([0] * 32, [32] * 32, limits)) == 1
    assert len(pieces_of(range(32), [1] * 32, limits)) == 1
