"""From a model, a machine and a wish to a plan: puts the simulation and the planner together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from zeroinf.engines.baselines.memory import baseline_terms
from zeroinf.engines.zero.codes import expansion, with_codes
from zeroinf.engines.zero.config import own_codes
from zeroinf.engines.zero.memory import zero_terms
from zeroinf.errors import DoesNotFitError, UsageError
from zeroinf.hardware.machine import Machine
from zeroinf.hardware.rates import Rates
from zeroinf.model.anatomy import Anatomy
from zeroinf.model.inspect import build_meta
from zeroinf.planner.advice import Advice, Change, alternatives, more_memory, remedies, remedies_together
from zeroinf.planner.decision import Decision, NothingFitsError
from zeroinf.planner.memory import Overhead
from zeroinf.planner.plan import AioSettings, Plan, TensorParallel
from zeroinf.planner.search import Planner
from zeroinf.planner.speeds import overhead_of, speeds_of
from zeroinf.planner.timing import Speeds
from zeroinf.planner.traits import TRAITS, refuse_beside_codes
from zeroinf.planner.wish import Wish
from zeroinf.planner.workload import Expansion, Lengths, Simulate
from zeroinf.simulation.workload import Simulator

# Where no single change does, so many pairs of them are named.
_REMEDIES = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """All that a plan depends on."""

    config: Any
    """The transformers config."""
    anatomy: Anatomy
    machine: Machine
    rates: Rates
    wish: Wish
    lengths: Lengths
    device: Literal["cuda", "cpu"]
    nvme_paths: tuple[Path, ...] = ()
    pin_memory: bool = True
    aio: AioSettings = field(default_factory=AioSettings)
    tensor_parallel: TensorParallel = field(default_factory=TensorParallel)
    trust_remote_code: bool = False
    own_zero_config: dict[str, Any] | None = None
    """The user's DeepSpeed JSON in the place of ours."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """The plan, what else was weighed, and the rates that it was timed with."""

    plan: Plan
    decision: Decision
    speeds: Speeds
    advice: tuple[Advice, ...] = ()
    """What changes would give, where that was asked for."""


def answer(question: Question, *, advise: bool = False) -> Answer:
    """Plan; with `advise` also what changes would give.

    Raises DoesNotFitError, with what would have to change, when nothing fits, and UsageError for what models with an
    encoder, or quantized already, do without.
    """
    _refuse_beside_an_encoder(question)
    refuse_beside_codes(question.anatomy, question.wish.engine, question.wish.wire)
    speeds = _speeds(question)
    streaming = replace(question, wish=replace(question.wish, engine="stream"))
    simulate = cache(lambda: _simulator(streaming, None))  # which every plan of the stream engine can use
    try:
        decision = _planner(question, speeds, simulate).choose(question.wish)
    except NothingFitsError as error:
        raise DoesNotFitError(error.message, hint=_remedies(question, error, simulate)) from None
    advice: Iterable[Advice] = ()
    if advise:
        changes = alternatives(question.wish, question.machine, question.anatomy)
        advice = _planned(question, changes, simulate, rows=None if question.anatomy.is_paged else decision)
    return Answer(plan=_plan(question, decision), decision=decision, speeds=speeds, advice=tuple(advice))


def _planned(
    question: Question, changes: Iterable[Change], simulate: Callable[[], Simulate], rows: Decision | None = None
) -> Iterator[Advice]:
    """Those of `changes` with which something fits, each planned with few candidates; with as many rows as in `rows`
    where simulating others takes long."""
    for change in changes:
        wish = change.wish
        if rows is not None:
            wish = replace(wish, batch_size=rows.chosen.choice.batch_size)
        changed = replace(question, wish=wish, machine=change.machine)
        try:
            decision = _planner(changed, _speeds(changed), simulate, thorough=False).choose(wish)
        except NothingFitsError:
            continue
        advice = Advice(change=change, candidate=decision.chosen)
        if advice.has_effect:
            yield advice


def _remedies(question: Question, error: NothingFitsError, simulate: Callable[[], Simulate]) -> str:
    """The changes with which it would fit, as lines of a hint, cheapest first."""
    asked = question.wish, question.machine
    found: list[Advice] = []
    if question.own_zero_config is None:  # whose settings are not flags
        found += _planned(question, remedies(*asked, question.anatomy), simulate)
        if not found:
            found += islice(_planned(question, remedies_together(*asked, question.anatomy), simulate), _REMEDIES)
    hardware = list(_planned(question, [more_memory(*asked, error.nearest)], simulate))
    lines = [f"{one.flags}: {one.speed} or more, {one.change.quality}" for one in (*found, *hardware)]
    if not hardware:
        lines.append(f"{error.nearest.wanted} for --offload {error.nearest.offload}")
    lines[len(found) : len(found)] = filter(None, [_shorter(question)])
    return "\n  ".join(("any of these would do, cheapest first:", *lines))


def _refuse_beside_an_encoder(question: Question) -> None:
    wish, name = question.wish, question.anatomy.architecture
    if question.anatomy.encoder is None:
        return
    if wish.engine != "stream":
        raise UsageError(
            f"the {wish.engine} engine does not run models with an encoder, such as {name}", hint="--engine stream"
        )
    if wish.fetch == "partitioned":
        raise UsageError(
            f"--fetch partitioned: ranks do not step together for models with an encoder, such as {name}",
            hint="--fetch replicated",
        )
    if wish.static_batches:
        raise UsageError(
            f"--static-batches has no effect: rows of {name} always start and end together", hint="drop it"
        )


def _speeds(question: Question) -> Speeds:
    machine = question.machine
    return speeds_of(
        machine,
        question.rates,
        dtype=question.anatomy.dtype,
        world_size=question.wish.world_size,
        disks=machine.disks,
    )


def _simulator(question: Question, expanded: Expansion | None) -> Simulator:
    return Simulator(
        question.config,
        question.anatomy,
        question.lengths,
        shares_passes=question.wish.engine == "stream",
        trust_remote_code=question.trust_remote_code,
        expansion=expanded,
    )


def _planner(
    question: Question, speeds: Speeds, streaming: Callable[[], Simulate], *, thorough: bool = True
) -> Planner:
    """For one question; `streaming` gives what simulates its model under the stream engine."""
    anatomy, lengths, wish = question.anatomy, question.lengths, question.wish
    expanded = None
    if codes := own_codes(question.own_zero_config or {}):
        model = build_meta(question.config, anatomy.dtype, question.trust_remote_code)
        expanded = expansion(anatomy, model, codes)
        anatomy = with_codes(anatomy, model, codes)
    simulate = streaming() if wish.engine == "stream" else _simulator(question, expanded)

    def overhead(gathers: bool) -> Overhead:
        if question.device == "cpu":
            return Overhead()
        return overhead_of(question.machine, question.rates, world_size=wish.world_size, gathers=gathers)

    terms = None
    if wish.engine == "zero":
        plan = replace(asked(question), anatomy=anatomy)
        terms = zero_terms(plan, overhead(wish.world_size > 1), question.own_zero_config)
    elif wish.engine != "stream":
        terms = baseline_terms(asked(question), overhead(wish.ranks_per_stream > 1))
    return Planner(
        anatomy,
        question.machine,
        speeds,
        overhead,
        simulate,
        device=question.device,
        lengths=lengths,
        engine_terms=terms,
        thorough=thorough,
    )


def asked(question: Question) -> Plan:
    """The plan before anything was chosen."""
    wish = question.wish
    return Plan(
        anatomy=question.anatomy,
        engine=wish.engine,
        offload="cpu" if wish.offload == "auto" else wish.offload,
        dtype=question.anatomy.dtype,
        device=question.device,
        world_size=wish.world_size,
        batch_size=wish.batch_size or 1,
        static_batches=wish.static_batches,
        prompt_tokens=question.lengths.prompt_tokens,
        new_tokens=question.lengths.new_tokens,
        scored_tokens=question.lengths.scored_tokens,
        requests=wish.requests,
        nvme_paths=question.nvme_paths,
        wire=wish.wire,
        pin_memory=question.pin_memory,
        aio=question.aio,
        tensor_parallel=question.tensor_parallel,
    )


def _plan(question: Question, decision: Decision) -> Plan:
    chosen = decision.chosen
    choice = chosen.choice
    return replace(
        asked(question),
        offload=choice.offload,
        fetch=choice.fetch,
        batch_size=choice.batch_size,
        micro_batch_rows=choice.micro_batch_rows,
        prefill_tokens=choice.prefill_tokens,
        forward_tokens=choice.forward_tokens,
        pool_pages=chosen.pool.pages,
        host_rows=choice.host_rows,
        host=chosen.host,
        resident_blocks=choice.resident_blocks,
        nvme_blocks=choice.nvme_blocks,
        terms=chosen.terms,
        timing=chosen.timing if TRAITS[choice.engine].is_timed else None,
    )


def _shorter(question: Question) -> str:
    """The longest prompts and completions with which one row would fit, as a hint; empty where none would."""
    shares = _shares(question.lengths)
    if not _fits_alone(question, shares[-1]):
        return ""
    share = next(share for share in shares if _fits_alone(question, share))
    rows = "" if question.wish.batch_size in (None, 1) else "--batch-size 1 with "
    shorter = f"{rows}prompts of {share.prompt_tokens} and {share.new_tokens} new tokens"
    return shorter if share != question.lengths else ""


def _fits_alone(question: Question, lengths: Lengths) -> bool:
    """Whether one row of `lengths` fits."""
    other = replace(question, lengths=lengths, wish=replace(question.wish, batch_size=1))
    try:
        _planner(other, _speeds(other), partial(_simulator, other, None), thorough=False).choose(other.wish)
    except NothingFitsError:
        return False
    return True


def _shares(lengths: Lengths) -> Sequence[Lengths]:
    """`lengths`, and the same halved again and again."""
    found = [lengths]
    while found[-1].prompt_tokens > 1:
        prompt, new = max(1, found[-1].prompt_tokens // 2), max(1, found[-1].new_tokens // 2)
        means: dict[str, Any] = dict.fromkeys(("mean_prompt_tokens", "mean_new_tokens", "mean_tokens", "mean_pages"))
        means["prompts"] = ()
        found.append(replace(lengths, prompt_tokens=prompt, new_tokens=new, **means))
    return found
