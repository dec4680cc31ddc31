"""What ways to run cannot exceed: no plan does, and a search that leaves ways out finds what one without would."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from math import inf

import pytest
from fake_machines import CHAIN, GIB, lengths_of, machine_of, overhead, speeds, workload_of

from zeroinf.engines.stream.stream_memory import stream_terms
from zeroinf.errors import DoesNotFitError
from zeroinf.planner.bounds import most_tokens_per_second
from zeroinf.planner.constraints import Constraints
from zeroinf.planner.decision import Decision
from zeroinf.planner.facts import Facts
from zeroinf.planner.search import Planner

# Layers of 256 MiB, 3 GiB in all.
LAYERS = replace(
    CHAIN,
    blocks=tuple(
        replace(block, tensors=(replace(block.tensors[0], shape=(1 << 15, 1 << 12)), *block.tensors[1:]))
        for block in CHAIN.blocks
    ),
)
# GPU memory, host memory, disk space in GiB, ranks, and the link's GB/s.
Box = tuple[float, float, float | None, int, float]
BOXES: list[Box] = [
    *((2.5, 64, None, 1, 25), (2.5, 6, 64, 1, 25), (2.2, 5, 64, 1, 2)),
    *((2.5, 18, None, 4, 2), (2.8, 15, 64, 4, 25), (3, 8, None, 1, 2)),
]
SHARES = (0.0, 0.75, 1.0)
# A way of more rows in host memory has to be so much faster.
WORTHWHILE = 1.03

simulated = cache(workload_of)


def facts_of(gpu: float, host: float, ranks: int, link_gbps: float) -> Facts:
    return Facts(
        anatomy=LAYERS,
        speeds=speeds(link_gbps=link_gbps, disk_gbps=3.0),
        simulate=simulated,
        engine_terms=stream_terms(LAYERS, ranks, overhead),
        lengths=lengths_of(),
        device="cuda",
        gpu_bytes=int(gpu * GIB),
        host_bytes=int(host * GIB),
        thorough=True,
    )


def choose(facts: Facts, constraints: Constraints) -> Decision:
    ranks = constraints.world_size
    machine = machine_of(gpus=ranks, gpu_bytes=facts.gpu_bytes, host_bytes=facts.host_bytes)
    planner = Planner(
        facts.anatomy, machine, facts.speeds, facts.engine_terms, simulated, device="cuda", lengths=facts.lengths
    )
    return planner.choose(constraints)


@pytest.mark.parametrize("box", BOXES)
def test_no_plan_is_faster_than_its_bound(box: Box) -> None:
    gpu, host, disk, ranks, link_gbps = box
    facts, found = facts_of(gpu, host, ranks, link_gbps), dict[float, float]()
    left_open = Constraints(
        world_size=ranks,
        nvme_space_bytes=None if disk is None else int(disk * GIB),
        embeddings="gpu",
        expert_parts=1,
        host_share="auto",
    )
    for share in SHARES:
        fixed = replace(left_open, host_share=share)
        try:
            found[share] = choose(facts, fixed).tokens_per_second
        except DoesNotFitError:
            continue
        assert found[share] <= most_tokens_per_second(facts, fixed)
    best = found.get(0.0, 0.0)
    for share in SHARES[1:]:
        best = found[share] if found.get(share, 0.0) > WORTHWHILE * best else best
    assert choose(facts, left_open).tokens_per_second == pytest.approx(best)


def test_what_a_link_gives_bounds_a_plan_closely() -> None:
    facts = facts_of(3, 8, 1, 2.0)
    asked = Constraints(embeddings="gpu", expert_parts=1)
    found = choose(facts, asked).tokens_per_second
    assert found <= most_tokens_per_second(facts, asked) < 2 * found


def test_a_gpu_that_holds_all_layers_has_no_bound() -> None:
    asked = Constraints(embeddings="gpu", expert_parts=1)
    assert most_tokens_per_second(facts_of(24, 64, 1, 25.0), asked) == inf
    assert most_tokens_per_second(facts_of(2.5, 64, 1, 25.0), asked) < inf


def test_where_no_layer_has_room_nothing_is_faster_than_0() -> None:
    asked = Constraints(offload="cpu", embeddings="gpu", expert_parts=1)
    assert most_tokens_per_second(facts_of(2.5, 2.5, 1, 25.0), asked) == 0
