"""From a model, a machine and a wish to a plan: puts the simulation and the planner together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
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
from zeroinf.planner.decision import Decision
from zeroinf.planner.memory import Overhead
from zeroinf.planner.plan import AioSettings, Plan, TensorParallel
from zeroinf.planner.search import Planner
from zeroinf.planner.speeds import overhead_of, speeds_of
from zeroinf.planner.timing import Speeds
from zeroinf.planner.traits import TRAITS, refuse_beside_codes
from zeroinf.planner.wish import Wish
from zeroinf.planner.workload import Lengths
from zeroinf.simulation.workload import Simulator


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


def answer(question: Question) -> Answer:
    """Plan. Raises DoesNotFitError, with what would have to change, when nothing fits, and UsageError for what models
    with an encoder, or quantized already, do without."""
    _refuse_beside_an_encoder(question)
    refuse_beside_codes(question.anatomy, question.wish.engine, question.wish.wire)
    speeds = _speeds(question)
    try:
        decision = _planner(question, speeds).choose(question.wish)
    except DoesNotFitError as error:
        raise DoesNotFitError(
            error.message, hint="; or ".join(filter(None, (error.hint, _shorter(question))))
        ) from None
    return Answer(plan=_plan(question, decision), decision=decision, speeds=speeds)


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


def _planner(question: Question, speeds: Speeds) -> Planner:
    anatomy, lengths, wish = question.anatomy, question.lengths, question.wish
    expanded = None
    if codes := own_codes(question.own_zero_config or {}):
        model = build_meta(question.config, anatomy.dtype, question.trust_remote_code)
        expanded = expansion(anatomy, model, codes)
        anatomy = with_codes(anatomy, model, codes)
    simulate = Simulator(
        question.config,
        question.anatomy,
        lengths,
        shares_passes=wish.engine == "stream",
        trust_remote_code=question.trust_remote_code,
        expansion=expanded,
    )

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
    lengths = question.lengths
    for share in _shares(lengths):
        try:
            _planner(replace(question, lengths=share), _speeds(question)).choose(replace(question.wish, batch_size=1))
        except DoesNotFitError:
            continue
        rows = "" if question.wish.batch_size in (None, 1) else "--batch-size 1"
        shorter = f"prompts of {share.prompt_tokens} and {share.new_tokens} new tokens" if share != lengths else ""
        return " with ".join(filter(None, (rows, shorter))) + " would fit"
    return ""


def _shares(lengths: Lengths) -> Sequence[Lengths]:
    """`lengths`, and the same halved again and again."""
    found = [lengths]
    while found[-1].prompt_tokens > 1:
        prompt, new = max(1, found[-1].prompt_tokens // 2), max(1, found[-1].new_tokens // 2)
        means: dict[str, Any] = dict.fromkeys(("mean_prompt_tokens", "mean_new_tokens", "mean_tokens", "mean_pages"))
        means["prompts"] = ()
        found.append(replace(lengths, prompt_tokens=prompt, new_tokens=new, **means))
    return found
