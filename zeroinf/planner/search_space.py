"""The offload targets and fetch modes that the user's constraints leave open to the search."""

from __future__ import annotations

from zeroinf.planner.choice import Fetch, Offload
from zeroinf.planner.constraints import Constraints
from zeroinf.planner.descriptor import descriptor_of

OFFLOADS: tuple[Offload, ...] = ("none", "cpu", "nvme")
"""Those that need fewer things to work first."""


def offloads_of(constraints: Constraints) -> tuple[Offload, ...]:
    """Offload targets that the user's constraints leave open."""
    if constraints.offload != "auto":
        return (constraints.offload,)
    streams = (
        constraints.fetch != "auto" or constraints.resident_blocks is not None
    )  # settings that mean nothing where all stays
    return OFFLOADS[1 if streams else 0 : 3 if constraints.nvme_space_bytes is not None else 2]


def fetches_of(constraints: Constraints, offload: Offload, *, has_encoder: bool) -> tuple[Fetch, ...]:
    """Fetch modes that the user's constraints leave open for that offload target."""
    gathers = "fetch" in descriptor_of(constraints.engine).options
    if (
        has_encoder
        or (constraints.expert_parts or 1) > 1
        or constraints.world_size == 1
        or offload == "none"
        or not gathers
    ):
        return ("replicated",)
    if constraints.fetch != "auto":
        return (constraints.fetch,)
    # A disk that each rank reads for itself is read as often as there are ranks.
    worthwhile = constraints.one_node and (constraints.gpus_are_linked or offload == "nvme")
    return ("partitioned", "replicated") if worthwhile else ("replicated",)
