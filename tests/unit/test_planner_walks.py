"""Counts of what layers of several sizes take where they rest, and the fewest that are left to NVMe."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fake_machines import CHAIN, GIB, MIB, lengths_of, machine_of, overhead, speeds, workload_of
from hypothesis import given
from hypothesis import strategies as st
from transformers import MixtralConfig

from zeroinf.engines.stream.stream_memory import stream_host_terms, stream_terms
from zeroinf.hardware.rates import Rates
from zeroinf.model.anatomy import Anatomy, Block, TensorSpec
from zeroinf.model.inspect import read_anatomy
from zeroinf.options.options import PlanOptions
from zeroinf.options.plan_input import input_of_best_gpus
from zeroinf.planner.choice import Choice
from zeroinf.planner.constraints import Constraints
from zeroinf.planner.decision import Decision
from zeroinf.planner.memory import total
from zeroinf.planner.search import Planner
from zeroinf.planner.tiers import tiers
from zeroinf.planner.walks import walks, with_pieces_on_disk
from zeroinf.simulation.make_plan import PlanInput, make_plan


def hybrid(sizes: list[int]) -> Anatomy:
    """Layers of these MiB."""
    blocks = tuple(
        Block(index=at, tensors=(TensorSpec(name=f"blocks.{at}.matrix", shape=(size * MIB // 2,), dtype="bfloat16"),))
        for at, size in enumerate(sizes)
    )
    return replace(CHAIN, blocks=blocks)


def choice(**placed: int) -> Choice:
    return Choice(
        engine="stream", offload="nvme", fetch="replicated", batch_size=4, micro_batch_rows=4, prefill_tokens=256,
        resident_blocks=placed["resident"], nvme_blocks=placed["nvme"],
    )  # fmt: skip


def test_each_layer_is_counted_where_it_rests() -> None:
    sizes = [3, 40, 3, 50, 3, 40]
    (walk,) = walks(hybrid(sizes), choice(resident=1, nvme=2))
    (lane,) = walk.lanes
    assert lane.resident == (50 * MIB,)
    assert (lane.streamed, lane.largest, lane.largest_read) == (5, 40 * MIB, 3 * MIB)
    assert (walk.host_bytes, walk.nvme_bytes, walk.nbytes) == (83 * MIB, 6 * MIB, sum(sizes) * MIB)


@given(st.lists(st.sampled_from([3, 40, 50]), min_size=1, max_size=12), st.data())
def test_no_fewer_layers_on_nvme_would_fit(sizes: list[int], data: st.DataObject) -> None:
    anatomy, resident = hybrid(sizes), data.draw(st.integers(0, len(sizes) - 1))
    budget = data.draw(st.integers(0, 2 * sum(sizes))) * MIB

    def left_bytes(some: Choice) -> int:
        counted = (term for term in stream_host_terms(anatomy, some, 1, overhead(False)) if term.origin == "counted")
        return budget - total(counted, "host")

    most = len(sizes) - resident
    fitting = [count for count in range(1, most + 1) if left_bytes(choice(resident=resident, nvme=count)) >= 0]
    found = with_pieces_on_disk(anatomy, choice(resident=resident, nvme=most), left_bytes)
    assert found.nvme_blocks == min(fitting, default=most)


def plan(anatomy: Anatomy, host_bytes: int) -> Decision:
    """With a GPU that holds a few of its layers, and a slow disk."""
    planner = Planner(
        anatomy,
        machine_of(gpu_bytes=2 * GIB, host_bytes=host_bytes),
        speeds(disk_gbps=1.0),
        stream_terms(anatomy, 1, overhead),
        workload_of,
        device="cuda",
        lengths=lengths_of(),
    )
    return planner.choose(Constraints(nvme_space_bytes=64 * GIB, host_share=0.0))


def test_a_hybrid_is_planned_with_the_size_of_each_layer() -> None:
    """Were each layer as large as the largest, most of this model would rest on NVMe."""
    sizes = [8, 200] * 12
    host_bytes = sum(sizes) * MIB + 7 * GIB // 2  # the process and the margin
    chosen = plan(hybrid(sizes), host_bytes).chosen
    assert total(chosen.terms, "host") <= host_bytes
    where = tiers([size * MIB for size in sizes], chosen.choice.resident_blocks, chosen.choice.nvme_blocks)
    assert {size for size, tier in zip(sizes, where, strict=True) if tier == "nvme"} == {8}


def test_experts_come_in_parts_where_the_host_cannot_hold_all_layers() -> None:
    """Buffers as large as whole layers would take the place of weights, on the host and on the GPU."""
    config = MixtralConfig(
        hidden_size=1024, intermediate_size=2048, num_hidden_layers=24, num_attention_heads=16, num_key_value_heads=4,
        num_local_experts=16, vocab_size=4096,
    )  # fmt: skip
    anatomy = read_anatomy(config, dtype="bfloat16")
    found = {}
    for host_bytes in (16 * GIB, 7 * GIB):
        given = PlanInput(
            config=config,
            anatomy=anatomy,
            machine=machine_of(gpu_bytes=9 * GIB // 4, host_bytes=host_bytes),
            rates=Rates.of("given", link_gbps=25.0),
            constraints=Constraints(batch_size=4, host_share=0.0, nvme_space_bytes=64 * GIB, routed_tokens=0),
            lengths=lengths_of(),
            device="cuda",
        )
        found[host_bytes] = make_plan(given, remedy=False).plan
    assert found[16 * GIB].expert_parts == 1
    assert found[7 * GIB].expert_parts > 1


@pytest.mark.full
def test_layers_whose_codes_are_multiplied_whole_are_not_split_at_a_loss() -> None:
    given = input_of_best_gpus(PlanOptions(model="gpt-oss-120b", machine="1xRTX4090-24GB-64GiB"))
    whole = replace(given, constraints=replace(given.constraints, expert_parts=1))
    found = make_plan(given).decision.tokens_per_second
    assert found >= make_plan(whole).decision.tokens_per_second
