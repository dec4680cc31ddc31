"""Prepares a run before weights are loaded: input, output, model, plan, and whether this machine can run it."""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from zeroinf.distributed.world import World
from zeroinf.engines.zero.config import build_zero_config
from zeroinf.errors import InputError, UsageError
from zeroinf.generation.settings import notes, refuse_sampling
from zeroinf.jobs.fingerprint import ListDigest, fingerprint, request_value
from zeroinf.jobs.inputs import find_inputs
from zeroinf.jobs.matching import prompt_digest
from zeroinf.jobs.output import Job
from zeroinf.jobs.output_files import began_before
from zeroinf.jobs.readers import none_can_run, read_inputs
from zeroinf.jobs.shape import flags_of
from zeroinf.jobs.sharing import as_array, request_bytes
from zeroinf.model.anatomy import Anatomy
from zeroinf.model.skeleton import read_generation_config
from zeroinf.model.source import ModelSource
from zeroinf.model.tokenizer import load_tokenizer
from zeroinf.options.contradictions import engine_of
from zeroinf.options.definition import fingerprint_of
from zeroinf.options.job_contradictions import check_output_of
from zeroinf.options.model import anatomy_of
from zeroinf.options.options import RunOptions
from zeroinf.options.planning import plan_run
from zeroinf.planner.plan import Plan
from zeroinf.planner.prefixes import PrefixGroups
from zeroinf.planner.workload import Lengths
from zeroinf.runs.queue import shortest_last
from zeroinf.service.requests import Extra, Refusal, Request, Work
from zeroinf.service.text import TextCodec

_PART = 4096
"""Requests that are tokenized, and then let go of, together."""


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
    work: tuple[Work, ...]
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
    requests, refusals, unused = read_inputs(
        options.prompts,
        find_inputs(options.input_files),
        options.settings(),
        input_format=options.input_format,
        shape=options.shape,
    )
    tokenizer = load_tokenizer(source)
    anatomy = anatomy_of(options, source, device)
    started = time.perf_counter()
    codec = TextCodec(tokenizer, anatomy, began)
    generation = read_generation_config(source)
    plain = sum(request.prompt is not None for request in requests)
    read = _tokenize(requests, codec, refuse_sampling(generation), keeps_text=options.output_file is None)
    work, too_long = read.work, read.refusals
    tokenize_s = time.perf_counter() - started
    if not work and options.output_file is None:
        raise InputError(none_can_run(refusals + too_long))
    _refuse_idle_sampling_flags(options, work)
    pairs = options.output_file is None and not options.to_stdout
    if pairs and any(item.sampling.logprobs is not None for item in work):
        raise UsageError("logprobs without --output-file: in=/out= pairs hold none", hint="add -o FILE, or drop them")
    refused = tuple(sorted(refusals + too_long, key=lambda refusal: refusal.index))
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
        extras=read.extras,
        output_format=options.output_format,
        model=options.model,
    )
    said = list(_notes_on_input(plain, unused, codec))
    said += notes(generation, sampled=any(not item.sampling.is_greedy for item in work))
    return JobInput(job=job, anatomy=anatomy, tokenize_s=tokenize_s, notes=tuple(said))


def lengths_of(anatomy: Anatomy, work: Sequence[Work], groups: PrefixGroups | None = None) -> Lengths:
    """The lengths that are planned for: those of `work`, what its sampling takes, and what its prompts share by
    `groups`."""
    asked = [count for item in work if (count := item.sampling.logprobs) is not None]
    rows = [(len(item.prompt), item.sampling.max_new_tokens) for item in work]
    return replace(
        Lengths.of(anatomy, rows, max(asked, default=None)),
        prefixes=None if groups is None else groups.shared(anatomy, rows),
        sampled=any(not item.sampling.is_greedy for item in work),
        penalized=any(item.sampling.alters_scores for item in work),
        structured=any(item.sampling.answer_format is not None for item in work),
    )


def groups_of(options: RunOptions, work: Sequence[Work]) -> PrefixGroups | None:
    """`work` in groups that begin alike; None where prefixes are not to be shared."""
    return PrefixGroups([as_array(item.prompt) for item in work]) if options.share_prefixes else None


def prepare(
    options: RunOptions, source: ModelSource, reading: JobInput, work: tuple[Work, ...], world: World, device: str
) -> PreparedRun:
    """Plan for `work`, what is still to be done. Raises the error of whatever does not hold."""
    held = request_bytes([len(item.prompt) for item in reading.job.work], world.local_size)
    groups = groups_of(options, work)
    lengths = replace(lengths_of(reading.anatomy, work, groups), request_bytes=held)
    plan, own_config, why = plan_run(options, source, reading.anatomy, lengths, len(work), world, device)
    if plan.prefix_pages and groups is not None:
        work = tuple(work[number] for number in groups.order)
    return PreparedRun(
        plan=plan,
        engine_choice=why,
        zero_config=own_config or build_zero_config(plan),
        work=work if plan.static_batches else shortest_last(work, plan.batch_size * plan.streams),
        refused=len(reading.job.refusals),
        rows_before=len(reading.job.work) - len(work),
        tokenize_s=reading.tokenize_s,
    )


@dataclass(frozen=True, slots=True)
class _Tokenized:
    """Requests that became work, those that could not, and what is kept of all of them."""

    work: tuple[Work, ...]
    refusals: list[Refusal]
    prompts: str
    """The digest of all prompts as they were written."""
    extras: dict[int, Extra]


def _tokenize(requests: list[Request], codec: TextCodec, cannot_sample: str | None, *, keeps_text: bool) -> _Tokenized:
    """Let go of `requests`, part by part: there may be more text than memory has room for beside its tokens.

    `cannot_sample` is why sampled requests are refused, if they are.
    """
    work, refusals, extras, prompts = list[Work](), list[Refusal](), dict[int, Extra](), ListDigest()
    requests.reverse()
    while requests:
        part = [requests.pop() for _ in range(min(_PART, len(requests)))]
        for request, found in zip(part, codec.encode_all(part), strict=True):
            prompts.add(request_value(request))
            if request.extra is not None:
                extras[request.index] = request.extra
            if isinstance(found, list) and cannot_sample is not None and not request.sampling.is_greedy:
                found = ValueError(cannot_sample)
            if isinstance(found, ValueError):
                refusals.append(Refusal.of(request, str(found)))
                continue
            text = _text(request, found, codec)
            work.append(
                Work(
                    index=request.index,
                    line=request.line,
                    file=request.file,
                    id=request.id,
                    text=text if keeps_text or (request.extra is not None and request.extra.echo) else None,
                    prompt=array("i", found),
                    sampling=request.sampling,
                    digest=prompt_digest(text, found),
                )
            )
    return _Tokenized(tuple(work), refusals, prompts.digest(), extras)


def _text(request: Request, prompt: Sequence[int], codec: TextCodec) -> str | None:
    """A prompt as it is shown and known again: as it was written, unless it came as tokens or was cut."""
    whole = request.tokens is None and request.truncate is None
    return request.prompt if whole or request.messages is not None else codec.decode_all(prompt)


def _notes_on_input(plain: int, unused: Sequence[str], codec: TextCodec) -> Iterator[str]:
    """`plain`: how many requests are no chats."""
    if unused:
        yield f"not used of the input: {flags_of(unused)} (--keep-columns all passes them to the output)"
    if plain and codec.has_chat_template and plain > codec.templated:
        yield (
            f"the model has a chat template, and {plain} prompts are taken as they are: --chat makes them user messages"
        )
    if codec.doubled:
        yield f"{codec.doubled} prompts begin with the beginning-of-sequence token already: no second one is added"


def _refuse_idle_sampling_flags(options: RunOptions, work: Sequence[Work]) -> None:
    idle = options.asked("top_p", "top_k", "min_p", "seed")
    if idle and work and all(item.sampling.is_greedy for item in work):
        raise UsageError(
            f"{', '.join(idle)} has no effect: every request is greedy", hint="add --temperature, or drop it"
        )
