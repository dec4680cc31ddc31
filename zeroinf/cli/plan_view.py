"""Prints a plan: a page of text for people, JSON for programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console

from zeroinf.engines.registry import descriptor_of
from zeroinf.hardware.machine import Machine
from zeroinf.planner.advice import Advice
from zeroinf.planner.choice import Choice
from zeroinf.planner.decision import Candidate, Decision, Rejection
from zeroinf.planner.memory import MARGIN, MemoryPlace, Term, taken, total
from zeroinf.planner.plan import Plan
from zeroinf.planner.summary import SOME_REQUESTS, job_duration, limited_by, plan_lines
from zeroinf.simulation.make_plan import PlanInput, PlanResult
from zeroinf.sizes import gib, rate_text

JSON_SCHEMA = 1

_PLACES: tuple[MemoryPlace, ...] = ("gpu", "host", "disk")
_BAR_WIDTH = 40
_LARGE_TERMS = 4


def print_plan(plan_input: PlanInput, found: PlanResult, *, explain: bool) -> None:
    """The plan on stdout, in a page; with `explain` every term and rate."""
    console = Console(soft_wrap=True, highlight=False, markup=False)
    for name, text in (
        ("model", _model(plan_input)),
        ("machine", machine_line(plan_input.machine)),
        ("job", _job(plan_input)),
    ):
        console.print(f"{name:<8} {text}")
    if plan_input.gpus_chosen:
        console.print(f"GPUs     {plan_input.gpus_chosen}")
    for index, line in enumerate(plan_lines(found.plan)):
        console.print(f"{'' if index else 'plan':<8} {line}")
    for place in _PLACES:
        if place in found.decision.budgets:
            _print_place(console, place, found.plan.terms, found.decision.budgets[place], explain=explain)
    _print_others(console, found)
    _print_advice(console, plan_input, found)
    _print_rates(console, plan_input, found, explain=explain)


def _model(plan_input: PlanInput) -> str:
    anatomy = plan_input.anatomy
    limit = f", context {anatomy.context_limit:,}" if anatomy.context_limit else ""
    computed = f"quantized with {anatomy.quantized.method}, computed " if anatomy.quantized is not None else ""
    return (
        f"{anatomy.architecture}, {anatomy.parameters / 1e6:,.0f} M parameters, {gib(anatomy.weight_bytes)} "
        f"{computed}in {anatomy.dtype}, {len(anatomy.blocks)} layers "
        f"of {_range(block.nbytes for block in anatomy.blocks)}, "
        f"KV cache {anatomy.kv_bytes_per_token / 2**10:,.0f} KiB a token{limit}"
    )


def _range(sizes: Iterable[int]) -> str:
    """Sizes in bytes as they are printed: one where all print alike, or the least and the most."""
    ordered = sorted(sizes)
    return " to ".join(dict.fromkeys((gib(ordered[0]), gib(ordered[-1]))))


def machine_line(machine: Machine) -> str:
    """GPUs, host memory and disks of a machine in a line."""
    host = f"{gib(machine.memory.available_bytes)} of host memory"
    if not machine.gpus:
        return f"no GPU: computes on the CPU, {host}"
    alike = Counter((gpu.name, gib(gpu.free_bytes)) for gpu in machine.gpus)
    gpus = ", ".join(f"{count} x {name}, {free} free" for (name, free), count in alike.items())
    disks = f", {gib(sum(disk.free_bytes for disk in machine.disks))} of disk" if machine.disks else ""
    shared = " of the same pool" if any(gpu.is_unified for gpu in machine.gpus) else ""
    return f"{gpus}, {host}{shared}{disks}"


def _job(plan_input: PlanInput) -> str:
    lengths, requests = plan_input.lengths, plan_input.constraints.requests
    count = "plenty of requests" if requests is None else f"{requests:,} requests"
    return f"{count}, up to {lengths.prompt_tokens} prompt and {lengths.new_tokens} new tokens"


def _print_place(console: Console, place: MemoryPlace, terms: Sequence[Term], budget: int, *, explain: bool) -> None:
    needed = taken(terms, place)
    if not needed:
        return
    margin = total(terms, place) - needed
    budget -= margin
    filled = min(_BAR_WIDTH, round(_BAR_WIDTH * needed / max(budget, 1)))
    console.print(f"\n{place:<4} [{'#' * filled}{'.' * (_BAR_WIDTH - filled)}] {gib(needed)} of {gib(budget)}")
    own = sorted((term for term in terms if term.place == place and term.name != MARGIN), key=lambda term: -term.nbytes)
    for term in own if explain else own[:_LARGE_TERMS]:
        console.print(f"     {gib(term.nbytes):>12}  {term.name} ({term.origin})")
    if not explain and len(own) > _LARGE_TERMS:
        rest = sum(term.nbytes for term in own[_LARGE_TERMS:])
        console.print(f"     {gib(rest):>12}  {len(own) - _LARGE_TERMS} more (--explain)")
    if margin:
        console.print(f"     {gib(margin):>12}  more stay free: {MARGIN} (assumed)")


def _print_others(console: Console, found: PlanResult) -> None:
    decision = found.decision
    if decision.alternatives or decision.rejected:
        console.print("\nother ways")
    for one in decision.alternatives:
        resident = f", {one.choice.resident_blocks} layers on the GPU" if found.plan.device == "cuda" else ""
        console.print(
            f"     {_way(one.choice, found.plan)}, batch {one.choice.batch_size}{resident}: "
            f"{rate_text(one.timing.tokens_per_second)} tokens/s, {limited_by(one.timing, found.plan.device)}"
        )
    for rejected in decision.rejected:
        console.print(f"     {_way(rejected, found.plan)}: does not fit, {rejected.reason}")


def _way(one: Choice | Rejection, plan: Plan) -> str:
    return f"offload {one.offload}" + (f", {one.fetch}" if plan.world_size > 1 else "")


def _print_advice(console: Console, plan_input: PlanInput, found: PlanResult) -> None:
    if not found.advice:
        return
    console.print("\nchanges, each planned with few candidates (a run expects as much or more)")
    width = max(len(one.flags) for one in found.advice)
    for one in found.advice:
        job = job_duration(one.candidate.timing, plan_input.constraints.requests, plan_input.lengths.new_tokens)
        console.print(f"     {one.flags:<{width}}  {one.speed:>14}, {job}, {one.change.quality}")
    if any(one.change.quality != "exact" for one in found.advice):
        console.print(
            "     what a change costs in quality: zeroinf eval --model MODEL --text FILE, with and without it"
        )


def _print_rates(console: Console, plan_input: PlanInput, found: PlanResult, *, explain: bool) -> None:
    speeds = found.speeds
    if explain:
        console.print(
            f"\nrates: link {speeds.link_gbps:.1f} GB/s a rank, disk {speeds.disk_gbps:.1f} GB/s, "
            f"all-gather {speeds.gather_gbps:.0f} GB/s, {speeds.tflops:.0f} TFLOPS, "
            f"GPU memory {speeds.hbm_gbps:.0f} GB/s, {speeds.model_launch_s * 1e6:.1f} us a launch"
        )
        if plan_input.anatomy.experts:
            console.print("experts: each token is taken to choose its own evenly; tokens that are alike need fewer")
    if speeds.projected:
        console.print("\nestimated (this machine was not measured: run `zeroinf doctor --measure`)")
        if explain:
            console.print(f"not measured: {', '.join(speeds.projected)}")
    if found.could_attend and any(gpu.uuid for gpu in plan_input.machine.gpus):
        console.print(
            "\nattention on the CPU was not compared: nobody has measured how fast host memory is read here "
            "(`zeroinf doctor --measure` does, and so does a run of five minutes or more before it plans)"
        )


def to_json(plan_input: PlanInput, found: PlanResult, *, advised: bool) -> dict[str, Any]:
    """The plan for programs, with the advice where it was asked for. `schema` changes when a name or a meaning does;
    docs/guide/plan.md says what each is."""
    anatomy, decision = plan_input.anatomy, found.decision
    return {
        "schema": JSON_SCHEMA,
        "model": {
            "architecture": anatomy.architecture,
            "dtype": anatomy.dtype,
            "parameters": anatomy.parameters,
            "weight_bytes": anatomy.weight_bytes,
            "blocks": len(anatomy.blocks),
            "block_bytes": max(block.nbytes for block in anatomy.blocks),
            "kv_bytes_per_token": anatomy.kv_bytes_per_token,
            "context_limit": anatomy.context_limit,
        },
        "machine": {
            "gpus": [{"name": gpu.name, "free_bytes": gpu.free_bytes} for gpu in plan_input.machine.gpus],
            "host_bytes": plan_input.machine.memory.available_bytes,
            "disk_bytes": plan_input.constraints.nvme_space_bytes,
        },
        "job": {
            "requests": plan_input.constraints.requests,
            "prompt_tokens": plan_input.lengths.prompt_tokens,
            "new_tokens": plan_input.lengths.new_tokens,
        },
        "plan": {"world_size": found.plan.world_size, **_candidate(decision.chosen, decision)},
        "alternatives": [
            *({"fits": True, **_candidate(one, decision)} for one in decision.alternatives),
            *({"fits": False, **_rejection(one)} for one in decision.rejected),
        ],
        **({"advice": [_advice(plan_input, one) for one in found.advice]} if advised else {}),
        "rates": {
            **asdict(found.speeds),
            "fitted": found.speeds.fitted.gpu,
            "projected": list(found.speeds.projected),
        },
    }


def _candidate(one: Candidate, decision: Decision) -> dict[str, Any]:
    memory = {
        place: {
            "available_bytes": decision.budgets[place],
            "needed_bytes": total(one.terms, place),
            "terms": [
                {"name": term.name, "bytes": term.nbytes, "origin": term.origin}
                for term in one.terms
                if term.place == place
            ],
        }
        for place in _PLACES
        if place in decision.budgets
    }
    timing = asdict(one.timing)
    if not descriptor_of(one.choice.engine).is_timed:
        timing = dict.fromkeys(timing)
    return {**asdict(one.choice), **timing, "memory": memory}


def _advice(plan_input: PlanInput, one: Advice) -> dict[str, Any]:
    choice, timing = one.candidate.choice, one.candidate.timing
    requests, lengths = plan_input.constraints.requests or SOME_REQUESTS, plan_input.lengths
    timed = descriptor_of(choice.engine).is_timed
    return {
        "flags": one.flags,
        "quality": one.change.quality,
        "offload": choice.offload,
        "batch_size": choice.batch_size,
        "tokens_per_second": timing.tokens_per_second if timed else None,
        "first_token_s": timing.first_token_s(lengths.prompt_tokens, choice.prefill_tokens) if timed else None,
        "job_s": timing.job_s(requests, lengths.new_tokens) if timed else None,
    }


def _rejection(one: Rejection) -> dict[str, Any]:
    return {**asdict(one), "reason": one.reason}
