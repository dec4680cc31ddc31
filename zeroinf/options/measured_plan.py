"""Plans a run with rates that are measured before, where `zeroinf doctor --measure` has not: those of its GPU, and how
fast host memory is read. They are kept in the machine's profile, as the doctor keeps them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from zeroinf.errors import ZeroinfError
from zeroinf.hardware.host_library import host_library
from zeroinf.hardware.measure.brief import measure_briefly
from zeroinf.hardware.measure.host_read_rate import measure_host_read, measure_read_beside_link
from zeroinf.hardware.profile import keep_profile
from zeroinf.hardware.rates import Rates
from zeroinf.hardware.snapshot import read_machine
from zeroinf.planner.plan import Plan
from zeroinf.simulation.make_plan import PlanInput, could_attend_on_cpu, make_plan

_WORTH_MEASURING_S = 300.0
"""A job that takes so long, as planned without it: measuring takes up to 20 s, once on a machine, and planning it
again."""

Say = Callable[[str], None]


def plan_with_measured_rates(plan_input: PlanInput, say: Say) -> Plan:
    """The plan, for which what is not known of this machine is measured where it may matter: host memory where the CPU
    shall attend, and that and the GPU for a long job whose weights do not all fit the GPU. `say` gets what was
    measured, or why it was not.

    Raises DoesNotFitError if nothing fits.
    """
    if plan_input.constraints.kv_attention == "cpu" and could_attend_on_cpu(plan_input):
        plan_input = _with(plan_input, dict(_host_reads(plan_input, say)), say)
    plan = make_plan(plan_input).plan
    if plan_input.device != "cuda" or not _is_worth_measuring(plan):
        return plan
    changed = _with(plan_input, _all(plan_input, say), say)
    return plan if changed.rates == plan_input.rates else make_plan(changed).plan


def _is_worth_measuring(plan: Plan) -> bool:
    timing = plan.timing
    if timing is None or plan.offload == "none":
        return False
    if plan.requests is None:
        return True
    return timing.job_s(plan.requests, plan.new_tokens) - timing.load_s >= _WORTH_MEASURING_S


def _all(plan_input: PlanInput, say: Say) -> dict[str, Any]:
    """What is not known, of the GPU first."""
    known, dtype = plan_input.rates, plan_input.anatomy.dtype
    reads_host, found = could_attend_on_cpu(plan_input), dict[str, Any]()
    if known.hbm_gbps is None or known.launch_s is None or dtype not in (known.matmul_tflops or {}):
        with ThreadPoolExecutor(1) as compiling:
            if reads_host:
                compiling.submit(_compile)
            try:
                found |= measure_briefly(plan_input.machine.gpus[0], dtype)
                say(f"measured for the plan: GPU memory {found['hbm_gbps']:,.0f} GB/s")
            except (ZeroinfError, OSError, ValueError) as error:
                say(f"the GPU could not be measured, so the plan assumes rates: {error}")
    return found | dict(_host_reads(plan_input, say) if reads_host else ())


def _compile() -> None:
    with suppress(ZeroinfError):  # which is told by the one who needs it
        host_library()


def _host_reads(plan_input: PlanInput, say: Say) -> Iterator[tuple[str, float]]:
    """What attention on the CPU depends on."""
    what = "reads of host memory"
    try:
        yield "host_read_gbps", (alone := measure_host_read())
        say(f"measured for the plan: host memory is read at {alone:.0f} GB/s")
        what += " beside the link"
        beside = measure_read_beside_link(plan_input.machine.gpus[0].index)
    except (ZeroinfError, OSError, MemoryError) as error:
        say(f"{what} could not be measured, so the plan assumes a rate: {error}")
        return
    say(f"beside the link at {beside.read_gbps:.0f} GB/s, and the link gives {beside.link_gbps:.0f} then")
    yield "host_read_beside_link_gbps", beside.read_gbps
    yield "link_beside_read_gbps", beside.link_gbps
    yield "link_gbps", beside.link_alone_gbps


def _with(plan_input: PlanInput, found: dict[str, Any], say: Say) -> PlanInput:
    """The input with the rates `found` that were not known, which are kept."""
    known = plan_input.rates.known
    new = {
        name: rate
        for name, rate in found.items()
        if name not in known or (name == "matmul_tflops" and rate != known[name])
    }
    if not new:
        return plan_input
    rates = Rates.of("measured", **new)
    try:
        keep_profile(read_machine(), rates, now=datetime.now(UTC))
    except ZeroinfError as error:
        say(f"the measured rates serve this run only: {error}")
    return replace(plan_input, rates=plan_input.rates.updated(rates))
