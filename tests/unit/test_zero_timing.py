"""How long DeepSpeed's engine is expected to take: one thing after the other, and about what runs took."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from fake_machines import CHAIN, speeds, workload_of

from zeroinf.model.anatomy import Anatomy
from zeroinf.options.options import PlanOptions
from zeroinf.options.plan_input import plan_input_of
from zeroinf.planner.choice import Choice, Offload
from zeroinf.planner.timing import Timing, time_plan
from zeroinf.planner.workload import Shape
from zeroinf.simulation.make_plan import make_plan

SHAPE = Shape(4, 4, 1 << 20)
PARAMETERS = sum(1 for _ in CHAIN.tensors())


def timed(
    anatomy: Anatomy = CHAIN, ranks: int = 1, engine: str = "zero", offload: Offload = "cpu", **rates: float
) -> Timing:
    choice = Choice(
        engine=engine,
        offload=offload,
        fetch="replicated" if engine == "stream" else "partitioned",
        batch_size=SHAPE.rows,
        micro_batch_rows=SHAPE.micro_batch_rows,
        prefill_tokens=SHAPE.prefill_tokens,
        resident_blocks=0,
        nvme_blocks=len(anatomy.blocks) if offload == "nvme" else 0,
    )
    return time_plan(anatomy, choice, workload_of(SHAPE), speeds(**rates), ranks, 4 * ranks)


def test_all_weights_cross_and_nothing_hides_it() -> None:
    """A link of half the speed takes as much longer, however long the host takes."""
    for launch in (1e-6, 1e-3):
        slow, fast = (timed(link_gbps=gbps, model_launch_s=launch) for gbps in (10.0, 20.0))
        assert slow.streamed_bytes == pytest.approx(CHAIN.weight_bytes, rel=1e-3)
        assert slow.decode_s - fast.decode_s == pytest.approx(CHAIN.weight_bytes / 20e9, rel=1e-3)


def test_each_parameter_takes_the_host_its_time_however_small_it_is() -> None:
    for ranks, least in ((1, 5), (2, 10), (4, 10)):
        slow, fast = (timed(ranks=ranks, model_launch_s=launch) for launch in (3e-3, 1e-3))
        assert slow.decode_s - fast.decode_s > least * PARAMETERS * 2e-3
    assert slow.binds == "kernel launches"
    assert timed(model_launch_s=1e-6).binds == "link"


def test_ours_waits_for_the_slowest_alone() -> None:
    slow, fast = (timed(engine="stream", model_launch_s=launch) for launch in (20e-6, 10e-6))
    assert slow.decode_s == fast.decode_s


def test_ranks_pull_a_part_each_and_gather_the_whole() -> None:
    slow, fast = (timed(ranks=4, gather_gbps=gbps) for gbps in (10.0, 20.0))
    assert slow.streamed_bytes == pytest.approx(CHAIN.weight_bytes / 4, rel=1e-3)
    assert slow.decode_s - fast.decode_s == pytest.approx(CHAIN.weight_bytes / 20e9, rel=1e-3)


@pytest.mark.parametrize("ranks", [1, 2])
def test_all_weights_are_read_once_before_they_cross(ranks: int) -> None:
    slow, fast = (timed(offload="nvme", ranks=ranks, disk_gbps=gbps) for gbps in (2.0, 4.0))
    assert slow.decode_s - fast.decode_s == pytest.approx(CHAIN.weight_bytes / 4e9, rel=1e-3)
    assert fast.decode_s - timed(ranks=ranks).decode_s == pytest.approx(CHAIN.weight_bytes / 4e9, rel=1e-3)


def test_a_tied_weight_crosses_for_each_of_its_uses() -> None:
    (embeddings,) = CHAIN.outside
    tied = replace(CHAIN, tied=(("head", embeddings.name),))
    assert timed(tied).streamed_bytes - timed().streamed_bytes == embeddings.nbytes


@pytest.mark.parametrize(
    ("model", "gpus", "rows", "link_gbps", "tokens_per_second"),
    [
        ("pythia-160m", 1, 32, 55.6, 634),
        ("pythia-160m", 2, 32, 55.5, 933),
        ("llama-2-7b", 1, 32, 55.6, 98),
        ("llama-2-7b", 2, 32, 55.5, 207),
        ("bloom-7b1", 1, 1, 55.5, 2.64),
        ("bloom-7b1", 4, 1, 53.0, 11.8),
    ],
)
def test_runs_took_about_as_long(
    model: str, gpus: int, rows: int, link_gbps: float, tokens_per_second: float, tmp_path: Path
) -> None:
    """Runs of docs/benchmarks-archive.md on H200s, with a usual launch time of their hosts: within a third."""
    gpu = {
        "name": "NVIDIA H200",
        "total_bytes": 141 << 30,
        "free_bytes": 140 << 30,
        "other_bytes": 0,
        "pcie_generation": 5,
        "pcie_width": 16,
        "capability": [9, 0],
    }
    memory = {"total_bytes": 512 << 30, "available_bytes": 500 << 30, "swap_bytes": 0, "numa_nodes": 1}
    memory |= {"cgroup_limit_bytes": None, "shared_memory_bytes": 256 << 30, "memlock_bytes": None}
    machine = {"gpus": [{**gpu, "index": i} for i in range(gpus)], "memory": memory, "disks": [], "cores": 64}
    rates = {
        "link_gbps": link_gbps,
        "links_gbps": {gpus: link_gbps * gpus},
        "matmul_tflops": {"bfloat16": {8192: 700}},
        "hbm_gbps": 4250,
        "all_gather_gbps": {gpus: 300} if gpus > 1 else None,
        "launch_s": 6e-6,
        "model_launch_s": 19e-6,
    }
    saved = tmp_path / "machine.json"
    saved.write_text(json.dumps({"schema": 1, "machine": machine, "rates": rates}))
    options = PlanOptions(
        model=model,
        dtype="bfloat16",
        engine="zero",
        offload="cpu",
        batch_size=rows,
        input_len=32,
        output_len=16 if rows > 1 else 8,
        requests=rows * gpus,
        num_gpus=gpus,
        machine=str(saved),
    )
    timing = make_plan(plan_input_of(options)).plan.timing
    assert timing is not None
    assert timing.tokens_per_second == pytest.approx(tokens_per_second, rel=1 / 3)
