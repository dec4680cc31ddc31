"""Experts of a layer that come and compute in parts: the same tokens, in slots of the size of a part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_machines import CHAIN, GIB, MIB, machine_of, overhead, shape_of, workload_of
from generating import greedy_by_transformers, rows_of, run_rows
from packed import packed_checkpoint
from quantized import fp8_experts_checkpoint, mxfp4_checkpoint
from ranks import on_ranks
from test_stream_gguf import SMALL_BLOCKS, Gguf
from test_stream_gguf import _own_cache as _own_cache
from test_stream_gguf import gguf_of as gguf_of
from test_stream_tokens import PACKED, PRESSED, counted_host_memory, plain_tokens, stream, tokens_of
from tiers import tiered
from transformers import AutoModelForCausalLM, MixtralConfig

from zeroinf.distributed.control import Control
from zeroinf.engines.stream import read_ahead, routed, weights
from zeroinf.engines.stream.stream_memory import stream_gpu_terms, stream_host_terms
from zeroinf.errors import DoesNotFitError, UsageError
from zeroinf.hardware.rates import Rates
from zeroinf.model.inspect import read_anatomy
from zeroinf.model.resolve import resolve_model
from zeroinf.planner.choice import Choice
from zeroinf.planner.constraints import Constraints, check_routed_tokens
from zeroinf.planner.memory import piece_bytes, total
from zeroinf.planner.plan import Plan
from zeroinf.planner.workload import Lengths
from zeroinf.simulation.make_plan import PlanInput, make_plan

Checkpoint = Callable[[str], Path]

# Mixtures of experts throughout, behind a dense layer, with biases, and in every other layer of a hybrid.
NAMES = ("mixtral", "deepseek_v3", "gpt_oss", "jamba", "qwen2_moe", "granitemoe", "qwen3_next")
WHERE: tuple[dict[str, Any], ...] = (
    {"expert_parts": 3},
    {"expert_parts": 4, "resident_blocks": 1},
    {"expert_parts": 2, "offload": "nvme", "nvme_blocks": 1, "resident_blocks": 1, "embeddings": "cpu"},
    {"expert_parts": 3, "offload": "nvme", "nvme_blocks": 3, "host_units": 4},
)
# Decode steps alone, and prompts, too.
ROUTED: tuple[dict[str, Any], ...] = (
    {"expert_parts": 4, "routed_tokens": 4},
    {"expert_parts": 3, "routed_tokens": 1000, "resident_blocks": 1},
    {"expert_parts": 2, "routed_tokens": 4, "offload": "nvme", "nvme_blocks": 3, "host_units": 3},
)


@pytest.mark.parametrize("name", tiered(NAMES, ("deepseek_v3", "gpt_oss")))
@pytest.mark.parametrize("where", WHERE, ids=lambda where: f"{where['expert_parts']}-{where.get('offload', 'cpu')}")
def test_tokens_are_those_of_plain_transformers(
    name: str, where: dict[str, Any], small_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder = small_checkpoint(name)
    engine = stream(folder, **where, nvme_paths=(tmp_path,) if "nvme_blocks" in where else ())
    try:
        assert tokens_of(engine, batches=2) == plain_tokens(folder)
    finally:
        engine.close()


@pytest.mark.parametrize("routed_tokens", [0, 6])
@pytest.mark.parametrize("given", [PRESSED, PACKED], ids=["padded", "packed"])
def test_all_forwards_of_a_pass_share_each_part(
    given: dict[str, int], routed_tokens: int, small_checkpoint: Checkpoint
) -> None:
    folder = small_checkpoint("mixtral")
    prompts = [[3 + (7 * number + 11 * at) % 380 for at in range(n)] for number, n in enumerate((7, 1, 20, 12))]
    rows = rows_of(prompts, [6, 9, 3, 2], ignore_eos=True)
    engine = stream(folder, expert_parts=3, routed_tokens=routed_tokens)
    _, scheduler = run_rows(engine, rows, **given)
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert [row.generated for row in rows] == [greedy_by_transformers(plain, row.prompt, row.generated) for row in rows]
    assert engine.stats().passes == scheduler.counts.passes
    engine.close()


@pytest.mark.parametrize("name", tiered(NAMES, ("deepseek_v3", "gpt_oss")))
@pytest.mark.parametrize("where", ROUTED, ids=lambda where: f"{where['routed_tokens']}-{where.get('offload', 'cpu')}")
def test_few_tokens_bring_only_the_experts_that_they_are_routed_to(
    name: str, where: dict[str, Any], small_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder = small_checkpoint(name)
    engine = stream(folder, **where, nvme_paths=(tmp_path,) if "nvme_blocks" in where else ())
    try:
        assert tokens_of(engine, batches=2) == plain_tokens(folder)
        stats = engine.stats()
        assert 0 < stats.routed_passes <= stats.passes - (2 if where["routed_tokens"] == 4 else 0)
        assert 0 < stats.spared_bytes < stats.routed_passes * stats.streamed_bytes_per_pass
    finally:
        engine.close()


@pytest.mark.parametrize("routed_tokens", [0, 1, 6])
def test_a_pass_that_breaks_between_two_parts_leaves_the_next_one_its_weights(
    routed_tokens: int, small_checkpoint: Checkpoint
) -> None:
    folder = small_checkpoint("mixtral")
    engine = stream(folder, expert_parts=4, routed_tokens=routed_tokens)
    module = engine.model.model.layers[1].mlp.experts
    calls = [0]

    def breaking(*ignored: Any) -> None:
        calls[0] += 1
        if calls[0] == 2:
            raise RuntimeError("broken")

    module.act_fn.register_forward_pre_hook(breaking)
    ids = {"input_ids": torch.tensor([[5, 6, 7]]), "use_cache": False}
    with pytest.raises(RuntimeError, match="broken"):
        engine.forward([ids, ids])
    assert engine.recover()
    assert tokens_of(engine) == plain_tokens(folder)
    engine.close()


@pytest.mark.parametrize("wire", ["int8", "int4"])
def test_parts_that_cross_as_codes_are_the_weights_that_layers_are(
    wire: str, small_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    nvme = {"expert_parts": 3, "routed_tokens": 4, "offload": "nvme", "nvme_blocks": 2, "host_units": 3}
    folder = small_checkpoint("qwen2_moe")
    whole, parts = stream(folder, wire=wire), stream(folder, wire=wire, expert_parts=2, resident_blocks=1)
    expected = tokens_of(whole)
    assert tokens_of(parts) == expected
    routed = stream(folder, wire=wire, **nvme, nvme_paths=(tmp_path,))
    assert tokens_of(routed) == expected
    assert routed.stats().spared_bytes > 0
    routed.close()


@pytest.mark.parametrize("method", ["fp8", "mxfp4"])
def test_quantized_experts_are_split_as_they_are_stored(method: str, tmp_path: Path) -> None:
    folder = fp8_experts_checkpoint("qwen3_moe", tmp_path) if method == "fp8" else mxfp4_checkpoint(tmp_path)
    whole, parts = stream(folder), stream(folder, expert_parts=3, resident_blocks=1, routed_tokens=4)
    assert tokens_of(parts) == tokens_of(whole)
    assert parts.stats().spared_bytes > 0
    assert parts.stats().slot_bytes < whole.stats().slot_bytes


@pytest.mark.parametrize("method", ["fp8_tensor", "modelopt_nvfp4"])
def test_a_scale_of_a_whole_expert_goes_with_it(method: str, tmp_path: Path) -> None:
    folder = packed_checkpoint("qwen3_moe", method, tmp_path)
    assert tokens_of(stream(folder, expert_parts=3, routed_tokens=4)) == plain_tokens(folder / "full")


def test_so_are_those_of_gguf_files(gguf_of: Gguf) -> None:
    file, full = gguf_of("qwen3_moe", SMALL_BLOCKS)
    for routed_tokens in (0, 1000):
        assert tokens_of(stream(file, expert_parts=2, routed_tokens=routed_tokens)) == plain_tokens(full)


def test_ranks_pull_the_parts_of_one_copy(small_checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = small_checkpoint("mixtral")
    expected = plain_tokens(folder)

    where = {"offload": "nvme", "nvme_blocks": 2, "host_units": 3, "nvme_paths": (tmp_path,)}

    def body(control: Control) -> Any:
        return tokens_of(stream(folder, control=control, world_size=2, expert_parts=2, routed_tokens=4, **where))

    assert on_ranks(2, body) == ([expected] * 2, [0, 0])


@pytest.mark.parametrize("wire", ["model", "int8"])
@pytest.mark.parametrize("resident", [0, 1])
def test_slots_and_host_memory_are_what_the_plan_says(resident: int, wire: Any, small_checkpoint: Checkpoint) -> None:
    engine = stream(small_checkpoint("deepseek_v3"), expert_parts=3, resident_blocks=resident, wire=wire)
    anatomy = read_anatomy(engine.model.config, dtype="float32")
    choice = Choice(
        engine="stream", offload="cpu", fetch="replicated", batch_size=4, micro_batch_rows=4, prefill_tokens=256,
        resident_blocks=resident, nvme_blocks=0, wire=wire, expert_parts=3,
    )  # fmt: skip
    on_gpu, stats = stream_gpu_terms(anatomy, choice, workload_of(shape_of(4)), 1, overhead(False)), engine.stats()
    planned = {term.name: term.nbytes for term in (*on_gpu, *stream_host_terms(anatomy, choice, 1, overhead(False)))}
    slots = planned["slots"] + planned.get("expanded slot", 0)
    assert stats.streamed_bytes_per_pass == stats.shared_host_bytes
    assert (stats.slot_bytes, stats.shared_host_bytes) == (slots, planned["weights, page-locked"])
    engine.close()


@pytest.mark.parametrize(("host_units", "routed_tokens", "wire"), [(0, 0, "model"), (4, 8, "model"), (6, 8, "int8")])
def test_host_memory_of_parts_on_two_tiers_is_what_the_plan_says(
    host_units: int,
    routed_tokens: int,
    wire: Any,
    small_checkpoint: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = small_checkpoint("deepseek_v3")
    anatomy = read_anatomy(resolve_model(str(folder)).config, dtype="float32")
    given: dict[str, Any] = {
        "offload": "nvme", "nvme_blocks": len(anatomy.blocks), "host_units": host_units, "expert_parts": 3,
        "routed_tokens": routed_tokens, "wire": wire,
    }  # fmt: skip
    choice = Choice(
        engine="stream", fetch="replicated", batch_size=4, micro_batch_rows=4, prefill_tokens=256, resident_blocks=0,
        **given,
    )  # fmt: skip
    planned = {term.name: term.nbytes for term in stream_host_terms(anatomy, choice, 1, overhead(False))}
    made = counted_host_memory(monkeypatch, weights, read_ahead, routed)
    stream(folder, nvme_paths=(tmp_path,), **given).close()
    stage = made.pop(0 if not host_units else 1)  # what lies outside of the layers, on its way
    names = ("weights", "NVMe read ring", "routed experts from NVMe")
    assert sum(made) == sum(planned.get(f"{name}, page-locked", 0) for name in names)
    assert stage == piece_bytes(anatomy.outside)
    assert bool(routed_tokens) == ("routed experts from NVMe, page-locked" in planned)


@pytest.fixture(scope="module")
def large_layers() -> PlanInput:
    """A model of which one layer is larger than the GPU."""
    config = MixtralConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=4, num_attention_heads=16, num_key_value_heads=4,
        num_local_experts=64, vocab_size=32000,
    )  # fmt: skip
    return PlanInput(
        config=config,
        anatomy=read_anatomy(config, dtype="bfloat16"),
        machine=machine_of(gpus=1, gpu_bytes=3 * GIB // 2, host_bytes=32 * GIB),
        rates=Rates.of("given", link_gbps=25.0),
        constraints=Constraints(offload="cpu", batch_size=4, host_share=0.0),
        lengths=Lengths(prompt_tokens=64, new_tokens=16),
        device="cuda",
    )


def test_the_planner_splits_layers_that_are_larger_than_the_gpu(large_layers: PlanInput) -> None:
    layer = max(block.nbytes for block in large_layers.anatomy.blocks)
    assert layer > 3 * GIB // 2
    plan = make_plan(large_layers).plan
    assert plan.expert_parts > 1
    assert total(plan.terms, "gpu") <= 3 * GIB // 2
    assert f"experts in {plan.expert_parts} parts" in repr(plan)
    whole = replace(large_layers, constraints=replace(large_layers.constraints, expert_parts=1))
    with pytest.raises(DoesNotFitError):
        make_plan(whole, remedy=False)


def test_parts_fill_the_host_memory_that_is_left(large_layers: PlanInput) -> None:
    layer = max(block.nbytes for block in large_layers.anatomy.blocks)
    machine = machine_of(gpus=1, gpu_bytes=3 * GIB // 2, host_bytes=5 * GIB + 3 * layer // 2)
    constraints = replace(large_layers.constraints, offload="auto", nvme_space_bytes=64 * GIB)
    plan = make_plan(replace(large_layers, machine=machine, constraints=constraints)).plan
    assert (plan.offload, plan.nvme_blocks) == ("nvme", 4)
    assert plan.host_units > 4  # what is no part of experts comes first
    left = machine.memory.available_bytes - total(plan.terms, "host")
    assert 0 <= left < 2 * layer // plan.expert_parts
    assert f"({plan.host_units} parts of them in host memory)" in repr(plan)


def test_layers_that_leave_most_of_the_gpu_stay_whole(large_layers: PlanInput) -> None:
    machine = machine_of(gpus=1, gpu_bytes=32 * GIB, host_bytes=32 * GIB)
    constraints = replace(large_layers.constraints, resident_blocks=0, routed_tokens=0)
    assert make_plan(replace(large_layers, machine=machine, constraints=constraints)).plan.expert_parts == 1


def test_few_rows_are_planned_with_the_experts_that_they_are_routed_to(large_layers: PlanInput) -> None:
    machine = machine_of(gpus=1, gpu_bytes=32 * GIB, host_bytes=32 * GIB)

    def planned(rows: int, **given: Any) -> Plan:
        constraints = replace(large_layers.constraints, resident_blocks=0, batch_size=rows, **given)
        return make_plan(replace(large_layers, machine=machine, constraints=constraints)).plan

    few, all_experts = planned(4), planned(4, routed_tokens=0)
    assert few.expert_parts > 1
    assert few.routed_tokens == 21  # of 64 experts they are expected to need fewer than half, two each
    assert f"up to {few.routed_tokens} tokens" in repr(few)
    assert few.timing is not None and all_experts.timing is not None
    # 4 rows are routed to 12 % of the experts, but these arrive while nothing computes.
    assert 2 < few.timing.tokens_per_second / all_experts.timing.tokens_per_second < 1 / (1 - (1 - 2 / 64) ** 4)
    assert planned(64).routed_tokens == 0


def test_experts_are_split_where_routed_ones_are_asked_for(large_layers: PlanInput) -> None:
    machine = machine_of(gpus=1, gpu_bytes=32 * GIB, host_bytes=32 * GIB)
    constraints = replace(large_layers.constraints, resident_blocks=0, batch_size=64, routed_tokens=16)
    plan = make_plan(replace(large_layers, machine=machine, constraints=constraints)).plan
    assert (plan.expert_parts, plan.routed_tokens) == (2, 16)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"parts": 1}, "no effect with --expert-parts 1"),
        ({"offload": "none"}, "no effect with --offload none"),
        ({"wire": "int8"}, "share scales"),
        ({"anatomy": CHAIN}, "no experts"),
    ],
)
def test_routed_experts_are_refused_where_there_can_be_none(given: dict[str, Any], message: str) -> None:
    odd = MixtralConfig(
        hidden_size=72, intermediate_size=68, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4,
        num_local_experts=4, vocab_size=320,
    )  # fmt: skip
    anatomy = read_anatomy(odd, dtype="float32")
    asked: dict[str, Any] = {"parts": None, "offload": "auto", "wire": "model", "anatomy": anatomy, "tokens": 4}
    check_routed_tokens(**asked)
    with pytest.raises(UsageError, match=message):
        check_routed_tokens(**{**asked, **given})


def test_parts_are_smaller_the_more_there_are(large_layers: PlanInput) -> None:
    def gpu_bytes(parts: int) -> int:
        constraints = replace(large_layers.constraints, expert_parts=parts, resident_blocks=0)
        machine = machine_of(gpus=1, gpu_bytes=64 * GIB, host_bytes=64 * GIB)
        return total(make_plan(replace(large_layers, machine=machine, constraints=constraints)).plan.terms, "gpu")

    needed = [gpu_bytes(parts) for parts in (1, 8, 32)]
    assert needed[0] - needed[1] > 3 * GIB > needed[1] - needed[2] > 100 * MIB
