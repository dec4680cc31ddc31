"""Measures how fast this machine reads its host memory before a run is planned that attention on the CPU could make
faster, where `zeroinf doctor --measure` has not. The rates are kept in the machine's profile, as the doctor keeps them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime

from zeroinf.errors import ZeroinfError
from zeroinf.hardware.measure.host_read_rate import measure_host_read, measure_read_beside_link
from zeroinf.hardware.profile import keep_profile
from zeroinf.hardware.rates import Rates
from zeroinf.hardware.snapshot import read_machine
from zeroinf.planner.plan import Plan
from zeroinf.simulation.make_plan import PlanInput, could_attend_on_cpu, make_plan

_WORTH_MEASURING_S = 60.0
"""A job that takes so long without it: measuring takes a second or two, once on a machine, and planning it again."""


def plan_with_host_reads(plan_input: PlanInput, say: Callable[[str], None]) -> Plan:
    """The plan, for which host memory has been measured where that is not known and may matter: where the CPU shall
    attend, or, if that is left to the planner, in a long job whose steps wait for the link. `say` gets what was
    measured, or why it was not.

    Raises DoesNotFitError if nothing fits.
    """
    if not could_attend_on_cpu(plan_input):
        return make_plan(plan_input).plan
    if plan_input.constraints.kv_attention == "auto":
        plan = make_plan(plan_input).plan
        if not _is_worth_measuring(plan):
            return plan
    measured = _measured(plan_input, say)
    return make_plan(replace(plan_input, rates=plan_input.rates.updated(measured))).plan


def _is_worth_measuring(plan: Plan) -> bool:
    timing = plan.timing
    if timing is None or timing.binds != "link":
        return False
    if plan.requests is None:
        return True
    return timing.job_s(plan.requests, plan.new_tokens) - timing.load_s >= _WORTH_MEASURING_S


def _measured(plan_input: PlanInput, say: Callable[[str], None]) -> Rates:
    """What attention on the CPU depends on; nothing that is known already, nor what cannot be measured."""
    found: dict[str, float] = {}
    try:
        found["host_read_gbps"] = measure_host_read()
        beside, link = measure_read_beside_link(plan_input.machine.gpus[0].index)
        found |= {"host_read_beside_link_gbps": beside, "link_gbps": link}
    except (ZeroinfError, OSError, MemoryError) as error:
        what = "reads of host memory beside the link" if found else "reads of host memory"
        say(f"{what} could not be measured, so the plan assumes a rate: {error}")
    rates = Rates.of("measured", **{name: rate for name, rate in found.items() if name not in plan_input.rates.known})
    if not rates.known:
        return rates
    beside_text = f", {found['host_read_beside_link_gbps']:.0f} beside the link" if len(found) > 1 else ""
    say(f"measured for the plan: host memory is read at {found['host_read_gbps']:.0f} GB/s{beside_text}")
    try:
        keep_profile(read_machine(), rates, now=datetime.now(UTC))
    except ZeroinfError as error:
        say(f"the measured rates serve this run only: {error}")
    return rates
