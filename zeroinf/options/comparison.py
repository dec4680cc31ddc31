"""Plans many models for one machine, or one model for many GPUs, side by side in processes.

Input: the options of a plan, in which the model or the GPU is a list. Output: a row for each, coarsely planned.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from typing import Literal

from zeroinf.errors import ZeroinfError
from zeroinf.hardware.process import uncollected
from zeroinf.options.lists import Listed, listed
from zeroinf.options.options import PlanOptions
from zeroinf.options.plan_input import plan_input_of
from zeroinf.planner.advice import Advice, Quality
from zeroinf.planner.summary import SOME_REQUESTS
from zeroinf.simulation.make_plan import sketch_plan

# Each process imports nothing anew, but its tensors' shapes take memory.
_MOST_PROCESSES = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparedPlan:
    """The outcome of a plan with some flags."""

    flags: str
    """Beside those that were asked for; empty: as asked."""
    quality: Quality
    rests: Literal["GPU", "GPU+host", "host", "disk"]
    """Where weights are kept: the GPU alone, the host as well, or a disk as well."""
    batch_size: int
    tokens_per_second: float
    first_token_s: float
    job_s: float
    """Of as many requests as were asked for, or a thousand; loading included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparisonRow:
    """A model or a GPU, and what was planned with it."""

    name: str
    weight_bytes: int | None = None
    """None where the model cannot be read or planned."""
    parameters: int | None = None
    outcomes: tuple[ComparedPlan, ...] = ()
    """Of those that fit, the one as asked first."""
    problem: str = ""
    """Why it does not fit as asked."""


def compare(options: PlanOptions, *, advise: bool = True) -> Iterator[ComparisonRow]:
    """A row for each model or GPU of a list, as they are done; with `advise` also planned with packed weights.

    Forks processes at the first one, as many as there are cores: to be called where no thread runs.
    """
    varied, names = listed(options)
    assert varied is not None
    plan = partial(_row, options, varied, advise)
    workers = min(len(os.sched_getaffinity(0)), len(names), _MOST_PROCESSES)
    if workers == 1:
        yield from map(plan, names)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
        try:
            for done in as_completed([pool.submit(plan, name) for name in names]):
                yield done.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _row(options: PlanOptions, varied: Listed, advise: bool, name: str) -> ComparisonRow:
    options = replace(options, model=name) if varied == "model" else replace(options, gpu=name)
    row = ComparisonRow(name=name)
    try:
        plan_input = plan_input_of(options)
        anatomy = plan_input.anatomy
        row = replace(row, weight_bytes=anatomy.weight_bytes, parameters=anatomy.parameters)
        with uncollected():
            found, short = sketch_plan(plan_input, advise=advise)
    except ZeroinfError as error:
        return replace(row, problem=error.message)
    except Exception as error:  # of a model's own code: a table of minutes is not lost for it
        text = str(error).partition("\n")[0]
        return ComparisonRow(name=name, problem=f"its plan failed: {type(error).__name__}: {text}")
    outcomes = tuple(_outcome(one, options) for one in found)
    return replace(row, outcomes=outcomes, problem=f"{short} would do" if short else "")


def _outcome(one: Advice, options: PlanOptions) -> ComparedPlan:
    choice, timing = one.candidate.choice, one.candidate.timing
    rests: Literal["GPU", "GPU+host", "host", "disk"] = "GPU"
    if choice.offload != "none":
        rests = "disk" if choice.nvme_blocks else "GPU+host" if choice.resident_blocks else "host"
    return ComparedPlan(
        flags=one.change.flags,
        quality=one.change.quality,
        rests=rests,
        batch_size=choice.batch_size,
        tokens_per_second=timing.tokens_per_second,
        first_token_s=timing.first_token_s(options.prompt_tokens, choice.prefill_tokens),
        job_s=timing.job_s(options.requests or SOME_REQUESTS, options.output_len),
    )
