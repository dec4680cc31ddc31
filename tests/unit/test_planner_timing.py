"""Predicted speed beside the passes that the real scheduler makes of the same requests, and what is chosen by it."""

from __future__ import annotations

import random
from dataclasses import replace
from statistics import fmean
from typing import Any

import pytest
from fake_machines import CHAIN, GIB, lengths_of, machine_of, overhead, speeds, workload_of
from generating import rows_of

from zeroinf.engines.stream.stream_memory import stream_terms
from zeroinf.generation.pass_limits import Limits
from zeroinf.generation.scheduler import Scheduler
from zeroinf.planner.choice import Choice
from zeroinf.planner.constraints import Constraints
from zeroinf.planner.decision import Candidate
from zeroinf.planner.search import Planner
from zeroinf.planner.timing import Timing, time_plan
from zeroinf.planner.workload import Shape

PROMPT, NEW = 256, 24


def choice_of(shape: Shape, engine: str = "stream") -> Choice:
    return Choice(
        engine=engine,
        offload="cpu",
        fetch="replicated" if engine == "stream" else "partitioned",
        batch_size=shape.rows,
        micro_batch_rows=shape.micro_batch_rows,
        prefill_tokens=shape.prefill_tokens,
        resident_blocks=0,
        nvme_blocks=0,
    )


def timed(shape: Shape, requests: int | None, **rates: float) -> Timing:
    return time_plan(CHAIN, choice_of(shape), workload_of(shape, prompt=PROMPT, new=NEW), speeds(**rates), 1, requests)


def walked(shape: Shape, requests: int, link_s: float, prefill_s: float) -> float:
    """Seconds of the scheduler's passes: each waits for the weights, or for its prompts."""
    limits = Limits(
        rows=shape.rows, pages=1 << 30, micro_batch_rows=shape.micro_batch_rows, prefill_tokens=shape.prefill_tokens
    )
    scheduler = Scheduler(limits, lambda tokens: 1)
    scheduler.add(rows_of([[1] * PROMPT] * requests, [NEW] * requests))
    seconds = 0.0
    while True:
        scheduler.admit()
        groups = scheduler.next_pass()
        if not groups:
            return seconds
        columns = sum(len(group.seats) * group.width for group in groups if group.width > 1)
        seconds += max(link_s, columns / shape.prefill_tokens * prefill_s)
        for group in groups:
            scheduler.advance(group)


@pytest.mark.parametrize("tflops", [1000.0, 10.0], ids=["the link binds", "prompts bind"])
@pytest.mark.parametrize("prompts", [1, 3, 16], ids=lambda prompts: f"{prompts} prompts a pass")
@pytest.mark.parametrize("requests", [1, 16, 24, 100, 640])
def test_predicted_seconds_are_those_of_the_schedulers_passes(requests: int, prompts: int, tflops: float) -> None:
    shape = Shape(16, 16, prompts * PROMPT)
    timing = timed(shape, requests, tflops=tflops)
    link_s = timing.streamed_bytes / speeds().link_gbps / 1e9
    assert timing.decode_s == pytest.approx(link_s), "else a pass is more than weights and prompts"
    seconds = walked(shape, requests, link_s, timing.prefill_s)
    assert requests * NEW / timing.tokens_per_second == pytest.approx(seconds, rel=0.04, abs=1.01 * timing.prefill_s)


@pytest.mark.parametrize("shape", [Shape(16, 16, 16 * PROMPT), Shape(16, 4, PROMPT)], ids=["one forward", "four"])
@pytest.mark.parametrize("requests", [16, 17, 40])
def test_a_forward_of_few_rows_is_launched_like_one_of_many(requests: int, shape: Shape) -> None:
    timing = timed(shape, requests, model_launch_s=1e-3, link_gbps=1e6)
    assert timing.binds == "kernel launches"
    limits = Limits(
        rows=shape.rows, pages=1 << 30, micro_batch_rows=shape.micro_batch_rows, prefill_tokens=shape.prefill_tokens
    )
    forwards = forwards_of([NEW] * requests, limits)[1]
    seconds = forwards * timing.decode_s / (shape.rows // shape.micro_batch_rows)
    assert requests * NEW / timing.tokens_per_second == pytest.approx(seconds, rel=0.1)


def mixed(lengths: list[int], *, prompts: int = 16, **rates: float) -> Timing:
    """The prediction for rows of these lengths, 32 of which are live, where a pass computes so many prompts."""
    shape = Shape(32, 32, prompts * PROMPT)
    workload = workload_of(shape, prompt=PROMPT, new=NEW)
    workload = replace(workload, new_tokens=fmean(lengths), most_new_tokens=max(lengths))
    return time_plan(CHAIN, choice_of(shape), workload, speeds(**rates), 1, len(lengths))


def limits_of(entering_rows: int, prompts: int = 16) -> Limits:
    tokens = prompts * PROMPT
    return Limits(rows=32, pages=1 << 30, micro_batch_rows=32, prefill_tokens=tokens, entering_rows=entering_rows)


def forwards_of(lengths: list[int], limits: Limits) -> tuple[int, int]:
    """Passes and forwards that the scheduler makes of such rows."""
    scheduler = Scheduler(limits, lambda tokens: 1)
    scheduler.add(rows_of([[1] * PROMPT] * len(lengths), lengths))
    passes = forwards = 0
    while True:
        scheduler.admit()
        groups = scheduler.next_pass()
        if not groups:
            return passes, forwards
        passes, forwards = passes + 1, forwards + len(groups)
        for group in groups:
            scheduler.advance(group)


@pytest.fixture(scope="module")
def lengths() -> list[int]:
    drawn = random.Random(7)
    return [drawn.randint(1, 256) for _ in range(800)]


def test_rows_of_different_lengths_take_a_forward_for_each_group_that_enters(lengths: list[int]) -> None:
    timing = mixed(lengths, link_gbps=1e6, model_launch_s=1e-3)
    assert timing.binds == "kernel launches"
    assert timing.entering_rows > 1
    _, forwards = forwards_of(lengths, limits_of(timing.entering_rows))
    seconds = sum(lengths) / timing.tokens_per_second
    assert seconds == pytest.approx(forwards * timing.decode_s, rel=0.05)
    assert forwards < 0.93 * forwards_of(lengths, limits_of(1))[1]


def test_rows_enter_at_once_where_their_prompts_hide_behind_the_link(lengths: list[int]) -> None:
    timing = mixed(lengths, link_gbps=0.1)
    assert timing.binds == "link"
    assert timing.entering_rows == 1
    passes, _ = forwards_of(lengths, limits_of(1))
    assert sum(lengths) / timing.tokens_per_second == pytest.approx(passes * timing.decode_s, rel=0.04)


@pytest.mark.parametrize("requests", [20, 32, 34, 60, 800])
@pytest.mark.parametrize("prompts", [1, 4])
def test_rows_that_enter_one_after_the_other_end_so_too(lengths: list[int], prompts: int, requests: int) -> None:
    """Passes go on until the last of them has ended, and few rows take as long as many where the link binds."""
    some = sorted(lengths[:requests], key=lambda length: length % 16)
    timing = mixed(some, prompts=prompts, link_gbps=0.1)
    assert timing.binds == "link"
    passes, _ = forwards_of(some, limits_of(1, prompts))
    assert sum(some) / timing.tokens_per_second == pytest.approx(passes * timing.decode_s, rel=0.12)


def test_the_first_pass_of_a_job_takes_longer() -> None:
    shape = Shape(16, 16, 16 * PROMPT)
    seconds = [
        64 * NEW / timed(shape, 64, first_pass_s=first_s, first_layer_s=layer_s).tokens_per_second
        for first_s, layer_s in ((0.0, 0.0), (3.0, 0.0), (0.0, 0.5))
    ]
    assert seconds[1] - seconds[0] == pytest.approx(3.0)
    assert seconds[2] - seconds[0] == pytest.approx(0.5 * len(CHAIN.blocks))


def test_a_job_without_end_runs_at_the_speed_of_a_very_long_one() -> None:
    shape = Shape(16, 16, 16 * PROMPT)
    endless, long = (timed(shape, requests, tflops=10.0).tokens_per_second for requests in (None, 100_000))
    assert endless == pytest.approx(long, rel=1e-3)


def test_prompts_come_a_few_at_a_time_where_a_wave_of_them_would_make_the_link_wait() -> None:
    chosen = choose(tflops=8.0, batch_size=48, requests=480)
    wave = timed(Shape(48, 48, 48 * PROMPT), 480, tflops=8.0)
    assert chosen.choice.prefill_tokens < 48 * PROMPT / 2
    assert chosen.timing.tokens_per_second > 1.05 * wave.tokens_per_second


def test_the_second_of_two_waves_is_not_far_smaller_than_the_first() -> None:
    most = choose(link_gbps=2.0, requests=10_000).choice.batch_size
    requests = most + most // 2
    chosen = choose(link_gbps=2.0, requests=requests)
    assert requests / 2 <= chosen.choice.batch_size < (requests / 2 + most) / 2
    fuller = choose(link_gbps=2.0, requests=requests, batch_size=most)
    assert chosen.timing.tokens_per_second > fuller.timing.tokens_per_second


@pytest.mark.parametrize("requests", [50, 99, 10_000])
@pytest.mark.parametrize("gpu_gib", [1.25, 1.5, 2.0])
def test_asking_for_the_rows_that_would_be_chosen_changes_nothing(gpu_gib: float, requests: int) -> None:
    chosen = choose(gpu_gib=gpu_gib, link_gbps=2.0, requests=requests)
    asked = choose(gpu_gib=gpu_gib, link_gbps=2.0, requests=requests, batch_size=chosen.choice.batch_size)
    assert asked.timing.tokens_per_second == pytest.approx(chosen.timing.tokens_per_second, rel=0.02)


def choose(*, requests: int, batch_size: int | None = None, gpu_gib: float = 2.0, **rates: Any) -> Candidate:
    planner = Planner(
        CHAIN,
        machine_of(gpu_bytes=int(gpu_gib * GIB), host_bytes=64 * GIB),
        speeds(**rates),
        stream_terms(CHAIN, 1, overhead),
        lambda shape: workload_of(shape, prompt=PROMPT, new=NEW),
        device="cuda",
        lengths=lengths_of(PROMPT, NEW),
    )
    constraints = Constraints(offload="cpu", batch_size=batch_size, requests=requests)
    return planner.choose(constraints).chosen


def test_a_batch_that_none_may_join_lasts_as_long_as_its_longest_row() -> None:
    shape = Shape(16, 16, 16 * PROMPT)

    def speed(mean: float) -> float:
        workload = replace(workload_of(shape, prompt=PROMPT, new=NEW), shares_passes=False, new_tokens=mean)
        return time_plan(CHAIN, choice_of(shape, "zero"), workload, speeds(link_gbps=0.1), 1, 64).tokens_per_second

    assert speed(NEW / 3) == pytest.approx(speed(NEW) / 3, rel=0.01), "a third of the tokens in the same passes"


def test_so_does_one_whose_prompts_take_several_passes(lengths: list[int]) -> None:
    shape = Shape(32, 32, 4 * PROMPT)
    workload = workload_of(shape, prompt=PROMPT, new=NEW)
    workload = replace(workload, new_tokens=fmean(lengths), most_new_tokens=max(lengths))
    timing = time_plan(CHAIN, choice_of(shape), workload, speeds(link_gbps=0.1), 1, len(lengths), static=True)
    limits = Limits(rows=32, pages=1 << 30, micro_batch_rows=32, prefill_tokens=4 * PROMPT, static=True)
    passes, _ = forwards_of(lengths, limits)
    assert timing.binds == "link"
    assert sum(lengths) / timing.tokens_per_second == pytest.approx(passes * timing.decode_s, rel=0.06)
    assert timing.entering_rows == 1
