"""CUDA graphs of layers: captured on a GPU they give the tokens of plain transformers; a failure leaves no trace."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from generating import PlainEngine, anatomy_of, greedy_by_transformers, put_into_slots, rows_of, run_rows
from packed import packed_checkpoint
from quantized import mxfp4_checkpoint
from small_models import VOCABULARY, build_model

from zeroinf.compat.models import experts_by
from zeroinf.distributed.control import Control
from zeroinf.distributed.world import World
from zeroinf.engines.stream.engine import StreamEngine
from zeroinf.generation.graphs import CudaCapturing, Graphs
from zeroinf.model.inspect import find_blocks, read_anatomy
from zeroinf.model.mixers import modules_of
from zeroinf.model.resolve import resolve_model
from zeroinf.planner.plan import Plan

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)
SIZES = (1, 2, 4, 8, 16, 20)
PLACES: dict[str, dict[str, Any]] = {"pages": {"pages": 9}, "host": {"pages": 3, "host_tokens": 160}}
DENSE = ["llama", "gpt2", "gemma2", "gemma3_text", "gpt_neox", "opt", "qwen3"]
WITH_EXPERTS = ["gpt_oss", "mixtral", "qwen3_moe"]


def run(model: Any, *, most: int = 1000, engine: Any = None, **limits: Any) -> tuple[Graphs, list[Any]]:
    """The graphs, which the model has lost again, and the rows that have run."""
    launched = [module for _, module in modules_of(model, anatomy_of(model).mixers)]
    capturing = CudaCapturing(CUDA, model.dtype)
    graphs = Graphs(list(find_blocks(model)[1]), capturing, SIZES, most=most, launched=launched)
    prompts = [[3 + (7 * row + 11 * at) % (VOCABULARY - 3) for at in range(n)] for row, n in enumerate((7, 1, 20, 12))]
    rows = rows_of(prompts, [19, 12, 7, 10], ignore_eos=True)
    given = {"rows": 3, "draw": 2, "prefill_tokens": 20, "forward_tokens": 13, **limits}
    run_rows(engine or PlainEngine(model), rows, **given)
    graphs.close()
    return graphs, rows


def compare(model: Any, rows: list[Any]) -> None:
    assert [row.generated for row in rows] == [greedy_by_transformers(model, row.prompt, row.generated) for row in rows]


@pytest.mark.parametrize("place", sorted(PLACES))
@pytest.mark.parametrize("name", DENSE)
def test_tokens_are_those_of_plain_transformers(name: str, place: str) -> None:
    model: Any = build_model(name).to(CUDA)
    graphs, rows = run(model, **PLACES[place])
    print(f"{name} {place}: {graphs.count} graphs, {graphs.replays} replays, refused: {graphs.refused}")
    compare(model, rows)
    assert not graphs.refused
    assert graphs.replays > graphs.count > 0


@pytest.mark.parametrize("place", sorted(PLACES))
@pytest.mark.parametrize("experts", ["batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_models_with_experts_have_them_too_unless_these_wait_for_the_gpu(name: str, experts: str, place: str) -> None:
    model: Any = build_model(name).to(CUDA)
    with experts_by(model, experts):
        graphs, rows = run(model, **PLACES[place])
        print(f"{name} {experts} {place}: {graphs.count} graphs, {graphs.replays} replays, refused: {graphs.refused}")
        compare(model, rows)
    assert graphs.count or "waits for the GPU" in graphs.refused
    assert "failed" not in graphs.refused


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_grouped_products_in_bfloat16_are_captured(name: str) -> None:
    model: Any = build_model(name).to(CUDA, torch.bfloat16)
    with experts_by(model, "grouped_mm"):
        graphs, rows = run(model, pages=9)
        _, others = run(model, pages=9, most=0)
    print(f"{name} bfloat16: {graphs.count} graphs, {graphs.replays} replays, refused: {graphs.refused}")
    firsts = [one.generated[0] == other.generated[0] for one, other in zip(rows, others, strict=True)]
    print(f"{name}: first tokens as without graphs {firsts}")
    assert not graphs.refused
    assert graphs.replays > graphs.count > 0


def test_recurrent_layers_run_without_graphs_beside_others() -> None:
    model: Any = build_model("qwen3_next").to(CUDA)
    with experts_by(model, "batched_mm"):
        graphs, rows = run(model, pages=9)
        compare(model, rows)
    assert graphs.replays > graphs.count > 0


@pytest.mark.parametrize("slots", [1, 2])
def test_a_graph_serves_all_layers_that_are_alike_in_one_slot_of_weights(slots: int) -> None:
    model: Any = build_model("llama").to(CUDA)
    engine = PlainEngine(model)  # whose hooks come before those of slots
    put_into_slots(model, slots)
    graphs, rows = run(model, engine=engine, pages=9)
    assert 0 < graphs.count <= slots * len(SIZES) < graphs.replays
    compare(build_model("llama").to(CUDA), rows)


@pytest.mark.parametrize("resident", [0, 2])
@pytest.mark.parametrize("wire", ["model", "int4", "int8"])
@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_layers_that_stream_have_them_as_codes_too(name: str, wire: Any, resident: int, tmp_path: Path) -> None:
    model: Any = build_model(name)
    model.save_pretrained(tmp_path)
    source = resolve_model(str(tmp_path))
    plan = Plan(
        anatomy=read_anatomy(source.config, dtype="float32"), engine="stream", dtype="float32", device="cuda",
        world_size=1, batch_size=4, offload="cpu", resident_blocks=resident, wire=wire,
    )  # fmt: skip
    engine = StreamEngine(plan, source, Control(World(), "cuda"), CUDA)
    graphs, rows = run(engine.model, engine=engine, pages=9)
    _, others = run(engine.model, engine=engine, pages=9, most=0)
    engine.close()
    print(f"{name} {wire} {resident}: {graphs.count} graphs, {graphs.replays} replays, refused: {graphs.refused}")
    assert [row.generated for row in rows] == [row.generated for row in others]
    if wire == "model":
        compare(model.to(CUDA), rows)
    if name == "llama":
        assert graphs.replays > graphs.count > 0
        assert not graphs.refused
    else:  # in float32 experts are transformers' own, which wait
        assert "waits for the GPU" in graphs.refused


@pytest.mark.parametrize("resident", [0, 2])
@pytest.mark.parametrize(("name", "method"), [("llama", "gptq_ordered"), ("llama", "nvfp4"), ("gpt_oss", "mxfp4")])
def test_layers_of_quantized_checkpoints_have_them(name: str, method: str, resident: int, tmp_path: Path) -> None:
    folder = mxfp4_checkpoint(tmp_path) if name == "gpt_oss" else packed_checkpoint(name, method, tmp_path)
    source = resolve_model(str(folder))
    plan = Plan(
        anatomy=read_anatomy(source.config, dtype="float32"), engine="stream", dtype="float32", device="cuda",
        world_size=1, batch_size=4, offload="cpu", resident_blocks=resident,
    )  # fmt: skip
    engine = StreamEngine(plan, source, Control(World(), "cuda"), CUDA)
    with experts_by(engine.model, "batched_mm"):
        graphs, rows = run(engine.model, engine=engine, pages=9)
        _, others = run(engine.model, engine=engine, pages=9, most=0)
    engine.close()
    print(f"{name} {method}: {graphs.count} graphs, {graphs.replays} replays, refused: {graphs.refused}")
    assert [row.generated for row in rows] == [row.generated for row in others]
    assert not graphs.refused
    assert graphs.replays > graphs.count > 0


def test_after_a_capture_that_fails_all_goes_on_without_more_graphs(monkeypatch: Any) -> None:
    monkeypatch.setattr(CudaCapturing, "watching", lambda self: nullcontext([]))
    monkeypatch.setattr(CudaCapturing, "unwatched", lambda self: nullcontext())
    model: Any = build_model("llama").to(CUDA)
    block = find_blocks(model)[1][1]
    block.mlp.register_forward_hook(lambda module, inputs, output: output * bool(output.nonzero().numel()))
    graphs, rows = run(model, pages=9)
    print(f"refused: {graphs.refused}")
    assert "a capture failed" in graphs.refused
    torch.rand(4, device=CUDA)  # random numbers are still to be had
    compare(model, rows)
    graphs, rows = run(build_model("qwen3").to(CUDA), pages=9)
    assert graphs.count
