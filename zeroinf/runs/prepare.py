"""Prepares a run before weights are loaded: input, output, model, plan, and whether this machine can run it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from zeroinf.distributed.world import World
from zeroinf.engines.zero.config import build_zero_config
from zeroinf.errors import InputError, UsageError
from zeroinf.generation.settings import notes, refuse_sampling
from zeroinf.jobs.fingerprint import fingerprint
from zeroinf.jobs.inputs import find_inputs
from zeroinf.jobs.output import Job
from zeroinf.jobs.output_files import began_before
from zeroinf.jobs.readers import none_can_run, read_inputs
from zeroinf.jobs.shape import flags_of
from zeroinf.jobs.tokenizing import groups_of, lengths_of, tokenize
from zeroinf.jobs.work_list import SAMPLED, WorkList, request_bytes
from zeroinf.model.anatomy import Anatomy
from zeroinf.model.skeleton import read_generation_config
from zeroinf.model.source import ModelSource
from zeroinf.model.tokenizer import load_tokenizer
from zeroinf.options.contradictions import check_max_model_len, engine_of
from zeroinf.options.definition import fingerprint_of
from zeroinf.options.job_contradictions import check_output_of
from zeroinf.options.model import anatomy_of
from zeroinf.options.options import RunOptions
from zeroinf.options.planning import plan_run
from zeroinf.planner.plan import Plan
from zeroinf.runs.queue import in_running_order
from zeroinf.service.text import TextCodec


@dataclass(frozen=True, kw_only=True, slots=True)
class JobInput:
    """The input of a job, as known before its output has been looked at."""

    job: Job
    anatomy: Anatomy
    tokenize_s: float
    notes: tuple[str, ...]
    """What the user should know of the input and of the model's generation config."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedRun:
    """Rank 0's decisions for a run, as sent to every rank."""

    plan: Plan
    engine_choice: str | None
    """Why `auto` did not take the default engine, if it did not."""
    zero_config: dict[str, Any]
    work: WorkList
    """What is still to be done."""
    refused: int
    rows_before: int
    """Requests that earlier runs have done."""
    tokenize_s: float


def read_job(options: RunOptions, source: ModelSource, device: str) -> JobInput:
    """Read and tokenise the requests, cheap checks first. Raises the error of whatever does not hold."""
    check_output_of(options)
    before = began_before(options.output_file) if options.output_file is not None and options.resume else None
    began = before or round(time.time(), 3)
    folder = None if options.output_file is None else options.output_file.parent
    entries = read_inputs(
        options.prompts,
        find_inputs(options.input_files),
        options.settings(),
        input_format=options.input_format,
        shape=options.shape,
        folder=folder,
    )
    tokenizer = load_tokenizer(source)
    anatomy = anatomy_of(options, source, device)
    started = time.perf_counter()
    check_max_model_len(options.max_model_len, anatomy)
    codec = TextCodec(tokenizer, anatomy, began, options.max_model_len)
    generation = read_generation_config(source)
    read = tokenize(entries, codec, refuse_sampling(generation), folder, keeps_text=options.output_file is None)
    work, refused = read.work, read.refusals
    tokenize_s = time.perf_counter() - started
    if not work and options.output_file is None:
        raise InputError(none_can_run(refused))
    _refuse_idle_sampling_flags(options, work)
    pairs = options.output_file is None and not options.to_stdout
    if pairs and work.most_logprobs is not None:
        raise UsageError("logprobs without --output-file: in=/out= pairs hold none", hint="add -o FILE, or drop them")
    marks = fingerprint(
        source,
        tokenizer,
        read.prompts,
        work,
        refused,
        engine=engine_of(options)[0],
        options=fingerprint_of(options) | {"engine": engine_of(options)[0], "dtype": anatomy.dtype},
        device=device,
    )
    job = Job(
        work=work,
        refusals=refused,
        fingerprint=marks,
        began=began,
        output_format=options.output_format,
        model=options.model,
    )
    said = list(_notes_on_input(read.plain, entries.unused, codec))
    said += notes(generation, sampled=work.any(SAMPLED))
    return JobInput(job=job, anatomy=anatomy, tokenize_s=tokenize_s, notes=tuple(said))


def prepare(
    options: RunOptions,
    source: ModelSource,
    reading: JobInput,
    work: WorkList,
    world: World,
    device: str,
    say: Callable[[str], None] = lambda line: None,
) -> PreparedRun:
    """Plan for `work`, what is still to be done; `say` gets what is measured for the plan.

    Raises the error of whatever does not hold.
    """
    held = request_bytes(len(reading.job.work), world.local_size)
    groups = groups_of(work) if options.share_prefixes else None
    lengths = replace(lengths_of(reading.anatomy, work, groups), request_bytes=held)
    plan, own_config, why = plan_run(options, source, reading.anatomy, lengths, len(work), world, device, say)
    return PreparedRun(
        plan=plan,
        engine_choice=why,
        zero_config=own_config or build_zero_config(plan),
        work=in_running_order(work, plan, groups),
        refused=len(reading.job.refusals),
        rows_before=len(reading.job.work) - len(work),
        tokenize_s=reading.tokenize_s,
    )


def _notes_on_input(plain: int, unused: Sequence[str], codec: TextCodec) -> Iterator[str]:
    """`plain`: how many requests are no chats."""
    if unused:
        yield f"not used of the input: {flags_of(unused)} (--keep-columns all passes them to the output)"
    if plain and codec.has_chat_template and plain > codec.templated:
        few = "1 prompt is taken as it is: --chat makes it a user message"
        many = f"{plain} prompts are taken as they are: --chat makes them user messages"
        yield f"the model has a chat template, and {few if plain == 1 else many}"
    if (doubled := codec.doubled) > 0:
        begin = "prompts begin" if doubled > 1 else "prompt begins"
        yield f"{doubled} {begin} with the beginning-of-sequence token already: no second one is added"


def _refuse_idle_sampling_flags(options: RunOptions, work: WorkList) -> None:
    idle = options.asked("top_p", "top_k", "min_p", "seed")
    if idle and work and not work.any(SAMPLED):
        raise UsageError(
            f"{', '.join(idle)} has no effect: every request is greedy", hint="add --temperature, or drop it"
        )
