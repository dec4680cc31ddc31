"""The offload targets and fetch modes that the user's constraints leave open to the search."""

from __future__ import annotations

from zeroinf.planner.choice import Fetch, Offload
from zeroinf.planner.wish import Wish

OFFLOADS: tuple[Offload, ...] = ("none", "cpu", "nvme")
"""Those that need fewer things to work first."""


def offloads_of(wish: Wish) -> tuple[Offload, ...]:
    """Offload targets that the user's constraints leave open."""
    if wish.offload != "auto":
        return (wish.offload,)
    streams = wish.fetch != "auto" or wish.resident_blocks is not None  # settings that mean nothing where all stays
    return OFFLOADS[1 if streams else 0 : 3 if wish.nvme_space_bytes is not None else 2]


def fetches_of(wish: Wish, offload: Offload, *, has_encoder: bool) -> tuple[Fetch, ...]:
    """Fetch modes that the user's constraints leave open for that offload target."""
    if has_encoder or wish.world_size == 1 or offload == "none" or wish.engine != "stream":
        return ("replicated",)
    if wish.fetch != "auto":
        return (wish.fetch,)
    # A disk that each rank reads for itself is read as often as there are ranks.
    worthwhile = wish.one_node and (wish.gpus_are_linked or offload == "nvme")
    return ("partitioned", "replicated") if worthwhile else ("replicated",)
