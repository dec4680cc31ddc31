"""Graphs of layers: tokens are those of plain transformers, and what cannot be captured runs without them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fake_graphs import FakeCapturing
from generating import PlainEngine, greedy_by_transformers, rows_of, run_rows
from small_models import PACKED_MODELS, REPRESENTATIVES, VOCABULARY, build_model
from tiers import tiered

from zeroinf.generation.graphs import Graphs
from zeroinf.model.inspect import find_blocks

SIZES = (1, 2, 4, 8, 16)
PLACES: dict[str, dict[str, Any]] = {"pages": {"pages": 9}, "host": {"pages": 3, "host_tokens": 160}}


def rows() -> list[Any]:
    prompts = [[3 + (7 * row + 11 * at) % (VOCABULARY - 3) for at in range(n)] for row, n in enumerate((7, 1, 20, 12))]
    return rows_of(prompts, [19, 12, 7, 10], ignore_eos=True)


def run_with_graphs(model: Any, engine: PlainEngine | None = None, **limits: Any) -> tuple[Graphs, list[Any]]:
    graphs, ran = Graphs(list(find_blocks(model)[1]), FakeCapturing(), SIZES), rows()
    given = {"rows": 3, "draw": 2, "prefill_tokens": 20, "forward_tokens": 13, **limits}
    run_rows(engine or PlainEngine(model), ran, **given)
    return graphs, ran


CELLS = [(name, place) for name in PACKED_MODELS for place in sorted(PLACES)]


@pytest.mark.parametrize(("name", "place"), tiered(CELLS, [cell for cell in CELLS if cell[0] in REPRESENTATIVES]))
def test_tokens_are_those_of_plain_transformers(name: str, place: str) -> None:
    model = build_model(name)
    graphs, ran = run_with_graphs(model, **PLACES[place])
    for block in find_blocks(model)[1]:
        del block.forward
    assert [row.generated for row in ran] == [greedy_by_transformers(model, row.prompt, row.generated) for row in ran]
    assert not graphs.refused
    assert graphs.replays > 2 * graphs.count > 0


def test_a_graph_serves_all_layers_that_are_alike_in_one_slot_of_weights() -> None:
    """Such as those that stream: only what lies in the slot differs."""
    model, few = build_model("llama"), 6
    engine = PlainEngine(model)
    blocks = list(find_blocks(model)[1])
    own = [{name: each.data.clone() for name, each in block.named_parameters()} for block in blocks]
    for block, tensors in zip(blocks, own, strict=True):
        for shared, each in zip(blocks[0].parameters(), block.parameters(), strict=True):
            each.data = shared.data

        def fill(*ignored: Any, tensors: dict[str, torch.Tensor] = tensors) -> None:
            for name, shared in blocks[0].named_parameters():
                shared.data.copy_(tensors[name])

        block.register_forward_pre_hook(fill)
    graphs, ran = run_with_graphs(model, engine)
    assert graphs.count < few < graphs.replays
    plain = build_model("llama")
    assert [row.generated for row in ran] == [greedy_by_transformers(plain, row.prompt, row.generated) for row in ran]


def test_what_waits_for_the_device_runs_without_graphs_and_says_so() -> None:
    model = build_model("llama")
    block = find_blocks(model)[1][1]
    block.mlp.register_forward_hook(lambda module, inputs, output: output * bool(output.nonzero().numel()))
    graphs, ran = run_with_graphs(model)
    assert "not permitted when stream is capturing" in graphs.refused
    assert graphs.replays
    for each in find_blocks(model)[1]:
        del each.forward
    assert [row.generated for row in ran] == [greedy_by_transformers(model, row.prompt, row.generated) for row in ran]
