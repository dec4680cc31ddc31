"""The last part of the search: steps that become smaller, beside all there is to choose from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest
from fake_machines import CHAIN, GIB, lengths_of, machine_of, overhead, speeds, workload_of

from zeroinf.engines.stream.stream_memory import stream_gpu_terms, stream_terms
from zeroinf.planner.choice import Choice
from zeroinf.planner.constraints import Constraints
from zeroinf.planner.hill_climbing import climb
from zeroinf.planner.memory import total
from zeroinf.planner.search import Planner
from zeroinf.planner.timing import time_plan
from zeroinf.planner.workload import Shape

PROMPT, NEW = 256, 24
RATES = speeds(link_gbps=4.0, tflops=20.0)


def around(point: tuple[int, int], factor: float) -> Iterator[tuple[int, int]]:
    for times in (factor, 1 / factor):
        yield round(point[0] * times), point[1]
        yield point[0], round(point[1] * times)


@pytest.mark.parametrize("start", [(1, 1), (1000, 1000), (3, 700)])
def test_a_lone_peak_is_found_from_anywhere(start: tuple[int, int]) -> None:
    rows, tokens = climb(start, around, lambda point: -abs(point[0] - 600) - abs(point[1] - 90))
    assert (rows, tokens) == (pytest.approx(600, rel=0.015), pytest.approx(90, rel=0.015))


def test_where_nothing_is_better_nothing_moves() -> None:
    assert climb((5, 5), around, lambda point: 0) == (5, 5)


def all_speeds(gpu_bytes: int, requests: int | None, rows: range) -> Iterator[float]:
    """Tokens/s of all that fits: micro-batches, prompts a pass, and the most resident blocks beside them."""
    for count, parts, prompts in product(rows, (1, 2, 4, 8), (1, 2, 4, 8, 16, 32)):
        if prompts > count or parts > count:
            continue
        shape = Shape(count, -(-count // parts), prompts * PROMPT)
        workload = workload_of(shape, prompt=PROMPT, new=NEW)
        choice = Choice(
            engine="stream",
            offload="cpu",
            fetch="replicated",
            batch_size=count,
            micro_batch_rows=shape.micro_batch_rows,
            prefill_tokens=shape.prefill_tokens,
            resident_blocks=0,
            nvme_blocks=0,
        )
        for residents in range(len(CHAIN.blocks) - 1, -1, -1):
            choice = replace(choice, resident_blocks=residents)
            if total(stream_gpu_terms(CHAIN, choice, workload, 1, overhead(False)), "gpu") <= gpu_bytes:
                yield time_plan(CHAIN, choice, workload, RATES, 1, requests).tokens_per_second
                break


@pytest.mark.parametrize("requests", [30, 80, None])
@pytest.mark.parametrize("gpu_gib", [1.0, 1.2, 1.5])
def test_nothing_that_fits_is_much_faster_than_what_is_chosen(gpu_gib: float, requests: int | None) -> None:
    gpu_bytes = int(gpu_gib * GIB)
    planner = Planner(
        CHAIN,
        machine_of(gpu_bytes=gpu_bytes, host_bytes=64 * GIB),
        RATES,
        stream_terms(CHAIN, 1, overhead),
        lambda shape: workload_of(shape, prompt=PROMPT, new=NEW),
        device="cuda",
        lengths=lengths_of(PROMPT, NEW),
    )
    chosen = planner.choose(Constraints(offload="cpu", requests=requests)).chosen
    rows = range(1, 1 + (requests or 2 * chosen.choice.batch_size), 3)
    assert chosen.timing.tokens_per_second > 0.97 * max(all_speeds(gpu_bytes, requests, rows))
