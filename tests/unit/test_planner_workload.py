"""What is known of a job's lengths, beside what the scheduler makes of such rows."""

from __future__ import annotations

import random
from collections.abc import Sequence
from math import ceil

import pytest
from fake_machines import CHAIN
from generating import rows_of

from zeroinf.generation.pass_limits import Limits
from zeroinf.generation.scheduler import Scheduler
from zeroinf.planner.workload import Lengths, Shape

Rows = Sequence[tuple[int, int]]


def scheduler_of(lengths: Lengths, rows: Rows, shape: Shape) -> Scheduler:
    """With the room that is planned for them, `rows` in it."""
    host = lengths.host(shape)
    limits = Limits(
        rows=shape.rows,
        pages=lengths.pool(CHAIN, shape.rows, shape.host_rows).pages if shape.host_rows < shape.rows else 0,
        micro_batch_rows=shape.micro_batch_rows,
        prefill_tokens=shape.prefill_tokens,
        host_tokens=host.tokens if host is not None else 0,
    )
    scheduler = Scheduler(limits, CHAIN.row_pages)
    scheduler.add(rows_of([[1] * prompt for prompt, _ in rows], [new for _, new in rows]))
    return scheduler


@pytest.mark.parametrize("seed", range(20))
def test_all_rows_of_a_job_are_live_at_once_where_it_was_planned(seed: int) -> None:
    draw = random.Random(seed)
    count, new = draw.randint(2, 40), draw.randint(1, 64)
    rows = [(draw.randint(1, 1500), new) for _ in range(count)]
    shape = Shape(count, count, 4096, host_rows=draw.randint(0, count))
    scheduler = scheduler_of(Lengths.of(CHAIN, rows), rows, shape)
    assert len(scheduler.admit()) == count


@pytest.mark.parametrize("micro_batch_rows", [100, 50, 25, 10])
@pytest.mark.parametrize("shortest", [100, 60, 1])
def test_a_step_attends_to_as_many_columns_as_planned(micro_batch_rows: int, shortest: int) -> None:
    draw, count, new = random.Random(shortest), 100, 40
    rows = [(draw.randint(shortest, 100), new) for _ in range(count)]
    lengths = Lengths.of(CHAIN, rows)
    scheduler, seen = scheduler_of(lengths, rows, Shape(count, micro_batch_rows, 1 << 20)), list[float]()
    scheduler.admit()
    while groups := scheduler.next_pass():
        if all(group.width == 1 for group in groups):
            seen.append(sum(group.length * len(group.seats) for group in groups) / count)
        for group in groups:
            scheduler.advance(group)
    planned = lengths.attended_tokens(ceil(count / micro_batch_rows))
    assert planned == pytest.approx(sum(seen) / len(seen), rel=0.05)


@pytest.mark.parametrize("tokens", [64, 100, 150, 400, 1600])
def test_prompts_take_as_many_passes_as_planned(tokens: int) -> None:
    rows = [(prompt, 1) for prompt in range(50, 101) for _ in range(8)]
    lengths = Lengths.of(CHAIN, rows)
    scheduler, passes = scheduler_of(lengths, rows, Shape(len(rows), len(rows), tokens)), 0
    scheduler.admit()
    while groups := scheduler.next_pass():
        passes += any(group.width > 1 for group in groups)
        for group in groups:
            scheduler.advance(group)
    assert len(rows) / lengths.prompts_a_pass(tokens) == pytest.approx(passes, rel=0.05)


def test_some_of_rows_that_live_differently_long_have_nearly_all_their_tokens() -> None:
    rows = [(10, new) for new in range(10, 101)]
    lengths = Lengths.of(CHAIN, rows)
    assert lengths.attended_tokens(1) == 10 + 100
    assert 10 + 30 < lengths.attended_tokens(1000) < 10 + 40


def test_requests_that_are_to_come_are_planned_by_their_mean_unless_so_many_of_the_longest_have_room() -> None:
    pages = CHAIN.row_pages(CHAIN.row_tokens(2048, 128))
    to_come = Lengths.up_to(CHAIN, 2048, 128, sampled=True, logprobs=3)
    assert (to_come.prompt_tokens, to_come.new_tokens, to_come.sampled, to_come.logprobs) == (2048, 128, True, 3)
    assert 0.5 * pages < to_come.pool(CHAIN, 100).pages / 100 < 0.6 * pages
    assert to_come.pool(CHAIN, 1).pages == pages  # the longest fits by itself
    assert Lengths.up_to(CHAIN, 2048, 128, rows=100).pool(CHAIN, 100).pages == 100 * pages
    assert Lengths.up_to(CHAIN, 1, 1).prompt_tokens == 1
