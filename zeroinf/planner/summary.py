"""A plan in a few lines, as text and as HTML."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import TYPE_CHECKING

from zeroinf.planner.descriptor import descriptor_of
from zeroinf.planner.memory import MemoryPlace, taken
from zeroinf.planner.timing import Timing
from zeroinf.sizes import clock, gib, rate_text

if TYPE_CHECKING:
    from zeroinf.planner.plan import Plan

_PLACES: dict[MemoryPlace, str] = {"gpu": "GPU memory", "host": "host memory", "disk": "disk"}
SOME_REQUESTS = 1000
"""A job of which the number of requests is not known is said to have so many."""
_WORTH_TELLING = 0.005


def plan_lines(plan: Plan) -> Iterator[str]:
    """The chosen plan in a few lines: how it runs, how fast, how long, what it takes."""
    tiers = _tiers(plan, len(plan.anatomy.blocks))
    gathers = "fetch" in descriptor_of(plan.engine).options
    if plan.world_size > 1 and gathers and plan.resident_blocks < len(plan.anatomy.blocks):
        tiers += f", weights {plan.fetch}"
    wire = f", weights {plan.wire} (lossy)" if plan.wire != "model" else ""
    if plan.anatomy.quantized is not None:
        wire = f", weights quantized already ({plan.anatomy.quantized.method})"
    batch = f"batch {plan.batch_size}"
    if plan.streams > 1:
        batch += f" on each of {plan.streams} streams"
    if plan.tensor_parallel.size > 1:
        batch += f", {plan.tensor_parallel.size} ranks a stream"
    yield f"{plan.engine} engine, offload {plan.offload}: {tiers}{wire}; {batch}"
    yield f"{_kv(plan)}{_forwards(plan)}"
    yield _speed(plan)
    if plan.timing is not None:
        first = plan.timing.first_token_s(plan.prompt_tokens, plan.prefill_tokens)
        yield f"first token after {clock(first)}, {job_duration(plan.timing, plan.requests, plan.new_tokens)}"
    places = (f"{gib(size)} of {name}" for place, name in _PLACES.items() if (size := taken(plan.terms, place)))
    yield f"takes {', '.join(places)}"


def job_duration(timing: Timing, requests: int | None, new_tokens: int) -> str:
    """The duration of a job, loading included; one of a thousand requests where no number is known."""
    count = requests or SOME_REQUESTS
    return f"{count:,} request{'s' * (count > 1)} in {clock(timing.job_s(count, new_tokens))}"


def _forwards(plan: Plan) -> str:
    whole = f"; prompts in one part each ({plan.anatomy.whole_because})" if plan.anatomy.whole_because else ""
    if plan.forward_tokens:
        return f"forwards of up to {plan.forward_tokens:,} packed tokens{_graphs(plan)}{whole}{_prefixes(plan)}"
    if plan.packs_scores:
        return f"forwards of up to {plan.prefill_tokens:,} packed tokens"
    shared = ", no shared prefixes" if plan.unshared_because else ""
    return f"padded forwards ({plan.padded_because}){whole}{shared}"


def _graphs(plan: Plan) -> str:
    if plan.graph_tokens:
        return f", CUDA graphs up to {plan.graph_tokens:,}"
    return f", no CUDA graphs ({plan.launched_because})" if plan.device == "cuda" and plan.launched_because else ""


def _prefixes(plan: Plan) -> str:
    if plan.unshared_because:
        return f"; no shared prefixes ({plan.unshared_because})"
    if plan.prefixes is None or plan.prefixes.saved_share < _WORTH_TELLING:
        return ""
    tokens = f"{plan.prefixes.saved_tokens * plan.requests:,.0f} " if plan.requests else ""
    return f"; shared prefixes save {tokens}prompt tokens ({plan.prefixes.saved_share:.0%})"


def _kv(plan: Plan) -> str:
    if plan.host is None:
        return f"the GPU attends ({plan.no_host_kernel}); " if plan.no_host_kernel else ""
    lossy = f" as {plan.host.dtype} (lossy)" if plan.host.dtype != "model" else ""
    on_gpu = plan.batch_size - plan.host_rows
    attended = ", where the CPU attends to them" if plan.kv_attention == "cpu" else ""
    if plan.no_host_kernel:
        by = " with torch's operators, many times slower" if attended else ", and the GPU attends"
        attended += f"{by} ({plan.no_host_kernel})"
    return f"KV cache: {on_gpu} rows on the GPU, {plan.host_rows} in host memory{lossy}{attended}; "


def _tiers(plan: Plan, blocks: int) -> str:
    if not descriptor_of(plan.engine).places_blocks:
        return f"{blocks} layers"
    on_host = blocks - plan.resident_blocks - plan.nvme_blocks
    mixed = f" ({plan.host_units} part{'s' * (plan.host_units > 1)} of them in host memory)" if plan.host_units else ""
    computing = "on the GPU" if plan.device == "cuda" else "in CPU memory"
    resting = {"gpu": "", "cpu": "in host memory", "disk": "read by row from the checkpoint"}[plan.embeddings]
    gathered = f", embeddings {resting}" if resting else ""
    gathered += f", experts in {plan.expert_parts} parts" if plan.expert_parts > 1 else ""
    gathered += f" (passes of up to {plan.routed_tokens} tokens: those routed to)" if plan.routed_tokens else ""
    parts = ((plan.resident_blocks, computing), (on_host, "in host memory"), (plan.nvme_blocks, f"on NVMe{mixed}"))
    (first, where), *others = ((count, where) for count, where in parts if count)
    whole = f"{first} of {blocks} layers {where}" if others else f"{blocks} layers {where}"
    return ", ".join((whole, *(f"{count} {where}" for count, where in others))) + gathered


def limited_by(timing: Timing, device: str) -> str:
    """The resource that a decode step waits for, in words that hold for the device."""
    words = dict[str, str]({"link": "PCIe transfer", "disk": "disk reads", "host memory": "reads of host memory"})
    words |= {"disk rows": "reads of rows from the checkpoint"}
    words |= {"GPU memory": "GPU memory bandwidth", "all-gather": "the all-gather between GPUs"}
    if device == "cpu":
        words |= {"GPU memory": "memory bandwidth", "kernel launches": "operator calls", "link": "memory copies"}
    return f"decode is limited by {words.get(timing.binds, timing.binds)}"


def _speed(plan: Plan) -> str:
    timing = plan.timing
    if timing is None:
        return f"no speed expected: the planner has no model of the {plan.engine} engine"
    expected = f"{rate_text(timing.tokens_per_second)} tokens/s expected: load {timing.load_s:.0f} s, "
    if plan.new_tokens == 1:
        return f"{expected}pass {timing.prefill_s:.2f} s"
    return (
        f"{expected}prefill {timing.prefill_s:.2f} s, step {timing.decode_s:.3f} s; {limited_by(timing, plan.device)}"
    )


def plan_html(plan: Plan) -> str:
    """The lines of `plan_lines` as HTML, and a table of all terms of memory, the largest of each place first."""
    lines = "".join(f"<div>{escape(line)}</div>" for line in plan_lines(plan))
    terms = sorted(plan.terms, key=lambda term: (list(_PLACES).index(term.place), -term.nbytes))
    rows = "".join(
        f"<tr><td>{_PLACES[term.place]}</td><td>{escape(term.name)}</td>"
        f"<td style='text-align: right'>{gib(term.nbytes)}</td><td>{term.origin}</td></tr>"
        for term in terms
    )
    head = "<tr><th>where</th><th>what</th><th>size</th><th>how known</th></tr>"
    return f"<div><b>{escape(plan.anatomy.architecture)}</b>, {plan.dtype}</div>{lines}<table>{head}{rows}</table>"
