"""Names the model, the machine and the job of a plan in the titles of its plot and its page."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from zeroinf.hardware.machine import Machine
from zeroinf.model.catalog import catalog_hub_id
from zeroinf.planner.plan import Plan
from zeroinf.simulation.make_plan import PlanInput
from zeroinf.sizes import gib


def title_of(model: str, plan_input: PlanInput) -> str:
    """The model on the machine, in a few words."""
    name = (catalog_hub_id(model) or model).rstrip("/")
    return f"{Path(name).name} on {machine_name(plan_input.machine)}"


def machine_name(machine: Machine) -> str:
    """The machine's GPUs as people call them."""
    if not machine.gpus:
        return f"{machine.cores} CPU cores"
    counts = Counter(gpu.name.removeprefix("NVIDIA ").removeprefix("GeForce ") for gpu in machine.gpus)
    return ", ".join(f"{count} x {name}" if count > 1 else name for name, count in counts.items())


def subtitle_of(plan_input: PlanInput, plan: Plan) -> str:
    """The rest of the machine, and the job."""
    machine, lengths = plan_input.machine, plan_input.lengths
    disk = f", {gib(sum(disk.free_bytes for disk in machine.disks))} of disk" if machine.disks else ""
    requests = f"{plan.requests:,} requests of " if plan.requests else ""
    return (
        f"{gib(machine.memory.available_bytes)} of host memory{disk}; {requests}up to {lengths.prompt_tokens:,} prompt "
        f"and {lengths.new_tokens:,} new tokens; {plan.dtype}"
    )
