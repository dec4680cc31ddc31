"""Plans a run from a model, a machine and the user's constraints, by connecting the simulation and the planner."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from zeroinf.engines.registry import default_engine, descriptor_of
from zeroinf.engines.zero.codes import expansion, with_codes
from zeroinf.engines.zero.config import own_codes
from zeroinf.errors import DoesNotFitError, UsageError
from zeroinf.generation.micro_batch import breaks_at
from zeroinf.hardware.machine import Machine
from zeroinf.hardware.rates import Rates
from zeroinf.model.anatomy import Anatomy
from zeroinf.model.catalog import catalog_config
from zeroinf.model.inspect import build_meta, read_anatomy
from zeroinf.planner.advice import (
    Advice,
    Change,
    alternatives,
    more_memory,
    remedies,
    remedies_together,
    smaller_weights,
    worthwhile,
)
from zeroinf.planner.constraints import Constraints
from zeroinf.planner.decision import Decision, NothingFitsError
from zeroinf.planner.descriptor import KERNEL_CAPABILITY, refuse_beside_codes
from zeroinf.planner.memory import Overhead
from zeroinf.planner.plan import AioSettings, Plan, TensorParallel
from zeroinf.planner.prefixes import SharedPrefixes
from zeroinf.planner.search import Planner, cpu_may_attend
from zeroinf.planner.speeds import overhead_of, speeds_of
from zeroinf.planner.timing import Speeds
from zeroinf.planner.workload import ExpansionCost, Lengths, Simulate
from zeroinf.simulation.workload import Simulator

# Where no single change does, so many pairs of them are named.
_REMEDIES = 2
_KERNEL_DTYPES = ("bfloat16", "float16")


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanInput:
    """Everything that a plan depends on."""

    config: Any
    """The transformers config."""
    anatomy: Anatomy
    machine: Machine
    rates: Rates
    constraints: Constraints
    lengths: Lengths
    device: Literal["cuda", "cpu"]
    nvme_paths: tuple[Path, ...] = ()
    pin_memory: bool = True
    aio: AioSettings = field(default_factory=AioSettings)
    tensor_parallel: TensorParallel = field(default_factory=TensorParallel)
    trust_remote_code: bool = False
    own_zero_config: dict[str, Any] | None = None
    """The user's DeepSpeed JSON in the place of ours."""
    checkpoints: Mapping[str, str] = field(default_factory=dict)
    """Hub ids of the model's quantized checkpoints by their names in the catalog, which advice may name."""
    gpus_chosen: str = ""
    """Which of the machine's GPUs are planned with, and why; empty: all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanResult:
    """The plan, the alternatives, the rates it was timed with, and advice."""

    plan: Plan
    decision: Decision
    speeds: Speeds
    advice: tuple[Advice, ...] = ()
    """What changes would give, where that was asked for."""
    could_attend: bool = False
    """Attention on the CPU was not compared, since nobody has measured how fast host memory is read, and a decode step
    waits for the link."""


def make_plan(plan_input: PlanInput, *, advise: bool = False, remedy: bool = True) -> PlanResult:
    """Plan; with `advise` also evaluate changes to the settings or the machine. Raises DoesNotFitError if nothing
    fits, whose hint names changes that would do, each of them planned; without `remedy` only what is short.
    """
    _refuse_beside_an_encoder(plan_input)
    refuse_beside_codes(plan_input.anatomy, plan_input.constraints.engine, plan_input.constraints.wire)
    asked, plan_input = plan_input.lengths.prefixes, _with_prefixes(plan_input)
    speeds = _speeds(plan_input)
    streaming = replace(plan_input, constraints=replace(plan_input.constraints, engine=default_engine()))
    simulate = cache(lambda: _simulator(streaming, None))  # which every plan of the default engine can use
    try:
        decision = _planner(plan_input, speeds, simulate).choose(plan_input.constraints)
    except NothingFitsError as error:
        hint = _remedies(plan_input, error, simulate) if remedy else error.hint
        raise DoesNotFitError(error.message, hint=hint) from None
    advice: Iterable[Advice] = ()
    if advise:
        changes = alternatives(plan_input.constraints, plan_input.machine, plan_input.anatomy, plan_input.checkpoints)
        advice = _planned(plan_input, changes, simulate, rows=None if plan_input.anatomy.is_paged else decision)
    plan = _plan(plan_input, decision)
    if plan_input.constraints.share_prefixes and (asked is None or asked.longest_pages):
        plan = replace(plan, unshared_because=_why_unshared(plan_input, plan))
    if plan.kv_attention == "cpu" or (plan_input.constraints.kv_attention == "auto" and speeds.reads_host):
        plan = replace(plan, no_host_kernel=plan_input.constraints.no_host_kernel)
    asks = plan_input.constraints.kv_attention == "cpu"
    if (plan.kv_attention == "cpu" and plan.no_host_kernel) or (asks and not speeds.reads_host):
        speeds = replace(speeds, projected=(*speeds.projected, "host_read_gbps"))
    if plan.embeddings == "disk" and plan_input.rates.disk_reads_per_s is None:
        speeds = replace(speeds, projected=(*speeds.projected, "disk_reads_per_s"))
    could_attend = not asks and could_attend_on_cpu(plan_input) and decision.chosen.timing.binds == "link"
    return PlanResult(plan=plan, decision=decision, speeds=speeds, advice=worthwhile(advice), could_attend=could_attend)


def could_attend_on_cpu(plan_input: PlanInput) -> bool:
    """Whether the CPU may attend, and nobody has measured how fast it reads host memory."""
    if plan_input.rates.host_read_gbps is not None:
        return False
    return cpu_may_attend(plan_input.anatomy, plan_input.constraints, plan_input.lengths, plan_input.device)


def _with_prefixes(plan_input: PlanInput) -> PlanInput:
    """The input in which prompts share what they are known to begin with, or may turn out to, where rows may."""
    lengths, constraints, anatomy = plan_input.lengths, plan_input.constraints, plan_input.anatomy
    prefixes = lengths.prefixes
    may_share = breaks_at(plan_input.config) is None and anatomy.mixers is None
    if not constraints.share_prefixes or lengths.scored_tokens or not may_share:
        prefixes = None
    elif prefixes is None:
        prefixes = SharedPrefixes.unknown(anatomy, lengths.prompt_tokens, lengths.new_tokens)
    return replace(plan_input, lengths=replace(lengths, prefixes=prefixes))


def _why_unshared(plan_input: PlanInput, plan: Plan) -> str:
    """Why prompts share nothing in a plan for which it was asked; empty where they may."""
    if plan.padded_because or plan.scored_tokens:
        return "forwards are padded" if plan.padded_because else "prompts are scored"
    if plan.anatomy.mixers is not None:
        return "recurrent layers keep a state of a prompt's end alone"
    return "" if breaks_at(plan_input.config) is None else "keys change with the length of a sequence"


def sketch_plan(plan_input: PlanInput, *, advise: bool = True) -> tuple[tuple[Advice, ...], str]:
    """The best of few candidates as asked and, where weights leave the GPU, with `advise` also with packed weights:
    those with which something fits, without flags as asked; and what is short where it does not fit as asked."""
    _refuse_beside_an_encoder(plan_input)
    refuse_beside_codes(plan_input.anatomy, plan_input.constraints.engine, plan_input.constraints.wire)
    constraints, machine = plan_input.constraints, plan_input.machine
    simulate = cache(lambda: _simulator(plan_input, None))
    found, short = list[Advice](), ""
    try:
        decision = _planner(plan_input, _speeds(plan_input), simulate, thorough=False).choose(constraints)
        as_asked = Change(flags="", constraints=constraints, machine=machine)
        found.append(Advice(change=as_asked, candidate=decision.chosen))
    except NothingFitsError as error:
        short = error.nearest.wanted
    if (
        advise
        and constraints.engine == default_engine()
        and not (found and found[0].candidate.choice.offload == "none")
    ):
        found += _planned(plan_input, smaller_weights(constraints, machine, plan_input.anatomy), simulate)
    return tuple(found), short


def _planned(
    plan_input: PlanInput, changes: Iterable[Change], simulate: Callable[[], Simulator], rows: Decision | None = None
) -> Iterator[Advice]:
    """The advice of `changes` with which something fits, each planned with few candidates; with as many rows as in
    `rows` where simulating others takes long."""
    for change in changes:
        constraints = change.constraints
        if rows is not None:
            constraints = replace(constraints, batch_size=rows.chosen.choice.batch_size)
        changed = replace(plan_input, constraints=constraints, machine=change.machine)
        simulator: Callable[[], Simulator] = simulate
        if change.checkpoint:
            config = catalog_config(change.checkpoint)
            changed = replace(changed, config=config, anatomy=read_anatomy(config, dtype=plan_input.anatomy.dtype))
            simulator = partial(_simulator, changed, None, simulate)
        try:
            decision = _planner(changed, _speeds(changed), simulator, thorough=False).choose(constraints)
        except NothingFitsError:
            continue
        advice = Advice(change=change, candidate=decision.chosen)
        if advice.has_effect:
            yield advice


def _remedies(plan_input: PlanInput, error: NothingFitsError, simulate: Callable[[], Simulator]) -> str:
    """The changes with which it would fit, as lines of a hint, cheapest first."""
    constraints, machine, anatomy = plan_input.constraints, plan_input.machine, plan_input.anatomy
    found: list[Advice] = []
    if plan_input.own_zero_config is None:  # whose settings are not flags
        found += _planned(plan_input, remedies(constraints, machine, anatomy, plan_input.checkpoints), simulate)
        if not found:
            found += islice(_planned(plan_input, remedies_together(constraints, machine, anatomy), simulate), _REMEDIES)
    hardware = list(_planned(plan_input, [more_memory(constraints, machine, error.nearest)], simulate))
    lines = [f"{one.flags}: {one.speed} or more, {one.change.quality}" for one in (*found, *hardware)]
    if not hardware:
        lines.append(f"{error.nearest.wanted} for --offload {error.nearest.offload}")
    lines[len(found) : len(found)] = filter(None, [_shorter(plan_input)])
    return "\n  ".join(("any of these would do, cheapest first:", *lines))


def _refuse_beside_an_encoder(plan_input: PlanInput) -> None:
    constraints, name = plan_input.constraints, plan_input.anatomy.architecture
    if plan_input.anatomy.encoder is None:
        return
    if not descriptor_of(constraints.engine).runs_encoders:
        raise UsageError(
            f"the {constraints.engine} engine does not run models with an encoder, such as {name}",
            hint=f"--engine {default_engine()}",
        )
    if constraints.fetch == "partitioned":
        raise UsageError(
            f"--fetch partitioned: ranks do not step together for models with an encoder, such as {name}",
            hint="--fetch replicated",
        )
    if constraints.static_batches:
        raise UsageError(
            f"--static-batches has no effect: sequences of {name} always start and end together", hint="drop it"
        )


def _speeds(plan_input: PlanInput) -> Speeds:
    machine = plan_input.machine
    return speeds_of(
        machine,
        plan_input.rates,
        dtype=plan_input.anatomy.dtype,
        world_size=plan_input.constraints.world_size,
        disks=machine.disks,
    )


def _simulator(
    plan_input: PlanInput, expanded: ExpansionCost | None, like: Callable[[], Simulator] | None = None
) -> Simulator:
    """`like`: gives what simulates another checkpoint of the model."""
    return Simulator(
        plan_input.config,
        plan_input.anatomy,
        plan_input.lengths,
        shares_passes=descriptor_of(plan_input.constraints.engine).shares_passes,
        trust_remote_code=plan_input.trust_remote_code,
        expansion=expanded,
        own_kernels=_has_own_kernels(plan_input),
        like=None if like is None else like(),
    )


def _has_own_kernels(plan_input: PlanInput) -> bool:
    """Whether experts and norms compute by the engine's kernels: on GPUs that are known to run them."""
    if plan_input.device == "cpu" or plan_input.anatomy.dtype not in _KERNEL_DTYPES:
        return False
    capabilities = [gpu.capability for gpu in plan_input.machine.gpus]
    able = all(capability is not None and capability >= KERNEL_CAPABILITY for capability in capabilities)
    return able and descriptor_of(plan_input.constraints.engine).has_kernels


def _planner(
    plan_input: PlanInput, speeds: Speeds, streaming: Callable[[], Simulate], *, thorough: bool = True
) -> Planner:
    """A planner for one question; `streaming` gives what simulates its model under the default engine."""
    anatomy, lengths, constraints = plan_input.anatomy, plan_input.lengths, plan_input.constraints
    expanded = None
    if codes := own_codes(plan_input.own_zero_config or {}):
        model = build_meta(plan_input.config, anatomy.dtype, plan_input.trust_remote_code)
        expanded = expansion(anatomy, model, codes)
        anatomy = with_codes(anatomy, model, codes)
    simulate = streaming() if constraints.engine == default_engine() else _simulator(plan_input, expanded)

    @cache
    def overhead(gathers: bool) -> Overhead:
        if plan_input.device == "cpu":
            return Overhead()
        return overhead_of(plan_input.machine, plan_input.rates, world_size=constraints.world_size, gathers=gathers)

    asked = replace(plan_as_requested(plan_input), anatomy=anatomy)
    terms = descriptor_of(constraints.engine).memory_terms(asked, overhead, plan_input.own_zero_config)
    return Planner(
        anatomy,
        plan_input.machine,
        speeds,
        terms,
        simulate,
        device=plan_input.device,
        lengths=lengths,
        thorough=thorough,
    )


def plan_as_requested(plan_input: PlanInput) -> Plan:
    """The plan with the user's own settings, before any other setting is chosen."""
    constraints = plan_input.constraints
    return Plan(
        anatomy=plan_input.anatomy,
        engine=constraints.engine,
        offload="cpu" if constraints.offload == "auto" else constraints.offload,
        dtype=plan_input.anatomy.dtype,
        device=plan_input.device,
        world_size=constraints.world_size,
        batch_size=constraints.batch_size or 1,
        static_batches=constraints.static_batches,
        prompt_tokens=plan_input.lengths.prompt_tokens,
        new_tokens=plan_input.lengths.new_tokens,
        scored_tokens=plan_input.lengths.scored_tokens,
        requests=constraints.requests,
        nvme_paths=plan_input.nvme_paths,
        wire=constraints.wire,
        pin_memory=plan_input.pin_memory,
        aio=plan_input.aio,
        tensor_parallel=plan_input.tensor_parallel,
    )


def _plan(plan_input: PlanInput, decision: Decision) -> Plan:
    chosen = decision.chosen
    choice = chosen.choice
    return replace(
        plan_as_requested(plan_input),
        offload=choice.offload,
        fetch=choice.fetch,
        batch_size=choice.batch_size,
        micro_batch_rows=choice.micro_batch_rows,
        prefill_tokens=choice.prefill_tokens,
        forward_tokens=choice.forward_tokens,
        graph_tokens=choice.graph_tokens,
        pool_pages=chosen.pool.pages,
        prefix_pages=chosen.pool.prefix_pages,
        prefixes=plan_input.lengths.prefixes if chosen.pool.prefix_pages else None,
        host_rows=choice.host_rows,
        host=chosen.host,
        resident_blocks=choice.resident_blocks,
        nvme_blocks=choice.nvme_blocks,
        host_units=choice.host_units,
        embeddings=choice.embeddings,
        expert_parts=choice.expert_parts,
        routed_tokens=choice.routed_tokens,
        terms=chosen.terms,
        timing=chosen.timing if descriptor_of(choice.engine).is_timed else None,
    )


def _shorter(plan_input: PlanInput) -> str:
    """The longest prompts and completions with which one row would fit, as a hint; empty where none would."""
    shares = _shares(plan_input.lengths)
    if not _fits_alone(plan_input, shares[-1]):
        return ""
    share = next(share for share in shares if _fits_alone(plan_input, share))
    rows = "" if plan_input.constraints.batch_size in (None, 1) else "--batch-size 1 with "
    shorter = f"{rows}prompts of {share.prompt_tokens} and {share.new_tokens} new tokens"
    return shorter if share != plan_input.lengths else ""


def _fits_alone(plan_input: PlanInput, lengths: Lengths) -> bool:
    """Whether one row of `lengths` fits."""
    other = replace(plan_input, lengths=lengths, constraints=replace(plan_input.constraints, batch_size=1))
    try:
        _planner(other, _speeds(other), partial(_simulator, other, None), thorough=False).choose(other.constraints)
    except NothingFitsError:
        return False
    return True


def _shares(lengths: Lengths) -> Sequence[Lengths]:
    """`lengths`, and the same halved again and again."""
    found = [lengths]
    while found[-1].prompt_tokens > 1:
        prompt, new = max(1, found[-1].prompt_tokens // 2), max(1, found[-1].new_tokens // 2)
        means: dict[str, Any] = dict.fromkeys(("mean_prompt_tokens", "mean_new_tokens", "mean_tokens", "mean_pages"))
        means["prompts"], means["prefixes"] = (), None
        found.append(replace(lengths, prompt_tokens=prompt, new_tokens=new, **means))
    return found
