"""Kernels of attention are compiled before the first forward, for all that a run asks of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generating import PlainEngine, anatomy_of, rows_of, run_rows
from small_models import VOCABULARY, build_model

from zeroinf.generation import micro_batch
from zeroinf.generation.attention import PackedLayer, Scores, attend_in_torch
from zeroinf.generation.warm_up import attention_compilations
from zeroinf.model.inspect import build_meta

CPU = torch.device("cpu")


def kinds_of(
    layer: PackedLayer, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scores: Scores
) -> set[Any]:
    """What decides which kernels are compiled: a kernel is chosen for steps, and another one for the other rows."""
    tensors = (query, keys, values)
    shapes = tuple((each.shape[0], each.shape[2], each.dtype) for each in tensors)
    aligned = tuple(stride % 8 for each in tensors for stride in each.stride())
    held = tuple((each.shape[1:], each.stride(0), each.dtype) for each in layer.memory)
    sinks = None if scores.sinks is None else scores.sinks.dtype
    view = layer.view
    asked = (shapes, aligned, held, scores.softcap, sinks, view.window, view.row_tokens > 0, view.has_new)
    return {(count == 1, *asked) for count in layer.view.tokens.counts}


@pytest.mark.parametrize("kv_dtype", ["model", "int8"])
@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "gpt_neox", "qwen3_next"])
def test_all_that_a_run_asks_of_attention_was_compiled(name: str, kv_dtype: Any, monkeypatch: Any) -> None:
    model: Any = build_model(name)
    compiled, asked = set[Any](), set[Any]()

    def compiling(layer: PackedLayer, *given: Any) -> torch.Tensor:
        compiled.update(kinds_of(layer, *given))
        assert not layer.view.tokens.rows.count_nonzero(), "a row has tokens"
        return torch.empty(0)

    def running(layer: PackedLayer, *given: Any) -> torch.Tensor:
        asked.update(kinds_of(layer, *given))
        return attend_in_torch(layer, *given)

    for each in attention_compilations(
        build_meta(model.config, "float32"),
        anatomy_of(model),
        CPU,
        row_tokens=40,
        pages=True,
        kv_dtype=kv_dtype,
        kernel=compiling,
    ):
        each()
    monkeypatch.setattr(micro_batch, "kernel_for", lambda device: running)
    prompts = [[3 + (7 * row + 11 * at) % (VOCABULARY - 3) for at in range(n)] for row, n in enumerate((7, 1, 20, 12))]
    rows = rows_of(prompts, [6, 5, 7, 4], ignore_eos=True)
    run_rows(
        PlainEngine(model),
        rows,
        rows=3,
        draw=2,
        prefill_tokens=20,
        forward_tokens=13,
        pages=3,
        host_tokens=160,
        kv_dtype=kv_dtype,
    )
    assert asked
    assert asked <= compiled


def test_steps_over_long_contexts_are_compiled_where_rows_grow_as_long() -> None:
    model: Any = build_model("llama")
    longest = list[int]()

    def compiling(layer: PackedLayer, *given: Any) -> torch.Tensor:
        longest.append(layer.view.longest_step)
        return torch.empty(0)

    for tokens in (100, 5000):
        longest.clear()
        compilations = attention_compilations(
            build_meta(model.config, "float32"),
            anatomy_of(model),
            CPU,
            row_tokens=tokens,
            pages=True,
            kv_dtype=None,
            kernel=compiling,
        )
        assert len(compilations) == 1  # its layers are alike
        compilations[0]()
        assert longest == [0, 1, min(tokens, 1025)]
