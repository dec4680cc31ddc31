"""Passes of few tokens: how many of a layer's experts these are routed to, and when it gains to bring no others.

Input: an anatomy and a number of tokens. Routers are taken to prefer no expert, so the shares are the most that is
expected.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import floor, log

from zeroinf.model.anatomy import Anatomy
from zeroinf.planner.walks import Walk
from zeroinf.planner.wire import CODES, Wire, is_coded

# Experts that are brought one by one arrive while nothing computes, so they must be fewer than that part of all.
_FEW = 1 / 2


def routed_share(anatomy: Anatomy, tokens: float) -> float:
    """The part of a layer's experts that so many tokens are expected to be routed to."""
    return max((1 - (1 - one.each / one.count) ** tokens for one in anatomy.experts), default=1.0)


def few_tokens(anatomy: Anatomy, wire: Wire) -> int:
    """The most tokens of a pass that are routed to less than half of the experts, 0 where it is always more or experts
    cannot be brought one by one."""
    if not anatomy.experts or not separable(anatomy, wire) or any(one.each >= one.count for one in anatomy.experts):
        return 0
    return min(floor(log(1 - _FEW) / log(1 - one.each / one.count)) for one in anatomy.experts)


@lru_cache(maxsize=64)
def separable(anatomy: Anatomy, wire: Wire) -> bool:
    """Whether no two experts share the scale of a group of codes."""
    if wire == "model":
        return True
    for one in anatomy.experts:
        tensors = anatomy.blocks[one.block].tensors
        for tensor, coded in zip(tensors, is_coded(tensors, anatomy.dtype, wire), strict=True):
            if coded and tensor.name in one.tensors and (tensor.numel // one.count) % CODES[wire].group:
                return False
    return True


@dataclass(frozen=True, slots=True)
class ExpertBytes:
    """The parts of what the layers of a walk move that are experts: of bytes over the link, and of those from disks."""

    of_link: float
    of_disk: float


def expert_bytes(walk: Walk) -> ExpertBytes:
    """The parts of a walk that are experts: of all that is streamed, and of what is on disks."""
    experts = walk.lanes[1:]
    streamed, on_disk = sum(lane.streamed_bytes for lane in experts), sum(lane.nvme_bytes for lane in experts)
    return ExpertBytes(streamed / (walk.streamed_bytes or 1), on_disk / (walk.nvme_bytes or 1))
