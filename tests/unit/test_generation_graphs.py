"""Graphs of layers: tokens are those of plain transformers, and what cannot be captured runs without them."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import pytest
import torch
from fake_graphs import FakeCapturing
from generating import PlainEngine, anatomy_of, greedy_by_transformers, put_into_slots, rows_of, run_rows
from small_models import PACKED_MODELS, REPRESENTATIVES, VOCABULARY, build_model
from tiers import tiered

from zeroinf.compat.models import experts_by
from zeroinf.compat.modules import own_parameters
from zeroinf.generation.graphs import Graphs
from zeroinf.model.inspect import find_blocks
from zeroinf.model.mixers import modules_of

SIZES = (1, 2, 4, 8, 16, 20)
PLACES: dict[str, dict[str, Any]] = {
    "pages": {"pages": 9},
    "host": {"pages": 3, "host_tokens": 160, "forward_tokens": 20},
}
WAITS = "a layer waits for the GPU"


def rows() -> list[Any]:
    prompts = [[3 + (7 * row + 11 * at) % (VOCABULARY - 3) for at in range(n)] for row, n in enumerate((7, 1, 20, 12))]
    return rows_of(prompts, [19, 12, 7, 10], ignore_eos=True)


def run_with_graphs(
    model: Any,
    *,
    engine: PlainEngine | None = None,
    capturing: FakeCapturing | None = None,
    most: int = 1000,
    **limits: Any,
) -> tuple[Graphs, list[Any]]:
    """The graphs, which the model has lost again, and the rows that have run."""
    ran = rows()
    launched = [module for _, module in modules_of(model, anatomy_of(model).mixers)]
    graphs = Graphs(list(find_blocks(model)[1]), capturing or FakeCapturing(), SIZES, most=most, launched=launched)
    given = {"rows": 3, "draw": 2, "prefill_tokens": 20, "forward_tokens": 13, **limits}
    run_rows(engine or PlainEngine(model), ran, **given)
    graphs.close()
    return graphs, ran


def expected(model: Any, ran: list[Any]) -> list[list[int]]:
    return [greedy_by_transformers(model, row.prompt, row.generated) for row in ran]


WITHOUT_KEYS = {"falcon_mamba", "mamba", "mamba2"}
CELLS = [(name, place) for name in PACKED_MODELS for place in sorted(PLACES) if name not in WITHOUT_KEYS]


@pytest.mark.parametrize(("name", "place"), tiered(CELLS, [cell for cell in CELLS if cell[0] in REPRESENTATIVES]))
def test_tokens_are_those_of_plain_transformers(name: str, place: str) -> None:
    model = build_model(name)
    with experts_by(model, "batched_mm"):
        graphs, ran = run_with_graphs(model, **PLACES[place])
    assert [row.generated for row in ran] == expected(model, ran)
    assert not graphs.refused
    assert graphs.replays > graphs.count > 0


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_that_wait_for_the_gpu_run_without_graphs_and_it_is_said(name: str) -> None:
    model, capturing = build_model(name), FakeCapturing()
    graphs, ran = run_with_graphs(model, capturing=capturing, pages=9)
    assert [row.generated for row in ran] == expected(model, ran)
    assert WAITS in graphs.refused
    assert not graphs.count
    assert not capturing.failed


@pytest.mark.parametrize("slots", [1, 2])
def test_a_graph_serves_all_layers_that_are_alike_in_one_slot_of_weights(slots: int) -> None:
    """Such as those that stream: what lies in a slot differs from layer to layer, and is lost behind it."""
    model = build_model("llama")
    engine = PlainEngine(model)  # whose hooks come before those of slots
    put_into_slots(model, slots)
    graphs, ran = run_with_graphs(model, engine=engine, pages=9)
    assert 0 < graphs.count <= slots * len(SIZES) < graphs.replays
    assert [row.generated for row in ran] == expected(build_model("llama"), ran)


def test_a_layer_that_waits_for_the_gpu_runs_without_graphs_and_it_is_said() -> None:
    model = build_model("llama")
    block = find_blocks(model)[1][1]
    block.mlp.register_forward_hook(lambda module, inputs, output: output * bool(output.nonzero().numel()))
    graphs, ran = run_with_graphs(model, pages=9)
    assert graphs.refused == f"layer 1: {WAITS}"
    assert graphs.replays
    assert [row.generated for row in ran] == expected(model, ran)


def test_after_a_capture_that_fails_layers_run_and_nothing_more_is_captured() -> None:
    model, capturing = build_model("llama"), FakeCapturing(misses=True)
    block = find_blocks(model)[1][1]
    block.mlp.register_forward_hook(lambda module, inputs, output: output * bool(output.nonzero().numel()))
    graphs, ran = run_with_graphs(model, capturing=capturing, pages=9)
    assert "layer 1: a capture failed: operation not permitted when stream is capturing" in graphs.refused
    assert capturing.failed == 1
    assert [row.generated for row in ran] == expected(model, ran)


def test_as_many_layers_are_captured_as_may_be() -> None:
    model = build_model("llama")
    graphs, ran = run_with_graphs(model, most=3, pages=9)
    assert graphs.count == 3
    assert [row.generated for row in ran] == expected(model, ran)


def test_few_tokens_replay_a_larger_graph_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model("llama")
    graphs, ran = run_with_graphs(model, pages=9)
    monkeypatch.setattr("zeroinf.generation.graphs.SERVED_TIMES", 1)
    by_size, _ = run_with_graphs(model, pages=9)
    assert 0 < graphs.count < by_size.count
    assert graphs.replays > by_size.replays
    assert [row.generated for row in ran] == expected(model, ran)


def test_what_layers_are_given_in_a_forward_of_many_tokens_is_gone_behind_it() -> None:
    model, given, alive = build_model("llama"), list[weakref.ref[torch.Tensor]](), list[bool]()

    class Engine(PlainEngine):
        def forward(self, micro_batches: Sequence[Mapping[str, Any]]) -> list[Any]:
            outputs = super().forward(micro_batches)
            alive.extend(each() is not None for each in given)
            return outputs

    def note(block: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if args[0].shape[1] > SIZES[-1]:
            given.append(weakref.ref(kwargs["position_embeddings"][0]))

    find_blocks(model)[1][0].register_forward_pre_hook(note, with_kwargs=True)
    graphs, ran = run_with_graphs(model, engine=Engine(model), pages=9, prefill_tokens=40, forward_tokens=40)
    assert graphs.replays
    assert alive
    assert not any(alive)
    assert [row.generated for row in ran] == expected(model, ran)


def test_recurrent_layers_run_without_graphs_beside_others() -> None:
    model = build_model("qwen3_next")
    with experts_by(model, "batched_mm"):
        graphs, ran = run_with_graphs(model, pages=9)
    assert graphs.replays > graphs.count > 0
    assert [row.generated for row in ran] == expected(model, ran)


def test_layers_that_are_given_their_hidden_states_by_name_run_without_graphs_and_it_is_said() -> None:
    model = build_model("llama")
    block = find_blocks(model)[1][1]
    engine, forward = PlainEngine(model), block.forward
    graphs = Graphs([block], FakeCapturing(), SIZES, most=1)
    block.forward, own = lambda hidden, **kwargs: own(hidden_states=hidden, **kwargs), block.forward
    ran = rows()
    run_rows(engine, ran, rows=3, pages=9, prefill_tokens=20, forward_tokens=13)
    block.forward = forward
    assert graphs.refused == "layer 0: a layer is not given its hidden states first"
    assert [row.generated for row in ran] == expected(model, ran)


class _Told(torch.Tensor):
    def data_ptr(self) -> int:
        return 1


class _Untold(torch.Tensor): ...


@pytest.mark.parametrize(("kind", "why"), [(_Told, ""), (_Untold, "a layer has weights of type _Untold")])
def test_weights_of_other_classes_have_graphs_where_they_say_their_address(kind: Any, why: str) -> None:
    model = build_model("llama")
    block = find_blocks(model)[1][1]
    block.mlp.scale = torch.ones(1).as_subclass(kind)
    assert Graphs([block], FakeCapturing(), SIZES, most=1).refused == (f"layer 0: {why}" if why else "")


def test_weights_that_are_there_while_a_layer_runs_alone_are_read_where_they_are_then() -> None:
    """Such as those that are expanded, whose names a module has in between not at all."""
    model = build_model("llama")
    held = own_parameters(find_blocks(model)[1][1].mlp.gate_proj)
    weight = held.pop("weight").data
    places, engine = cycle([torch.empty_like(weight) for _ in range(2)]), PlainEngine(model)

    def expand(block: Any, inputs: Any) -> None:
        held["weight"] = next(places).copy_(weight)

    def forget(block: Any, inputs: Any, output: Any) -> None:
        held.pop("weight").fill_(float("nan"))

    block = find_blocks(model)[1][1]
    hooks = block.register_forward_pre_hook(expand), block.register_forward_hook(forget)
    graphs, ran = run_with_graphs(model, engine=engine, pages=9)
    for hook in hooks:
        hook.remove()
    held["weight"] = weight
    assert graphs.replays > graphs.count > 0
    assert [row.generated for row in ran] == expected(model, ran)


def test_layers_with_tables_of_their_own_have_no_graphs_and_it_is_said() -> None:
    model = build_model("llama")
    find_blocks(model)[1][1].table = torch.nn.Embedding(2, 2)
    graphs, ran = run_with_graphs(model, pages=9)
    assert graphs.refused == "layer 1: a layer reads rows of a table, which may be gathered in host memory"
    assert graphs.replays
    assert [row.generated for row in ran] == expected(model, ran)
