"""Counts what a pass moves for its weights on one rank, which the planner turns into seconds.

Engines that place layers share `placed_transfers`; another engine's descriptor names a function of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from zeroinf.model.anatomy import Anatomy
from zeroinf.planner.choice import Choice
from zeroinf.planner.figures import EngineFigures
from zeroinf.planner.walks import Walk


@dataclass(frozen=True, kw_only=True, slots=True)
class Transfers:
    """Bytes that a pass moves for the weights of the layers that it visits."""

    link_bytes: int
    """Across this rank's link."""
    gathered_bytes: int = 0
    """Of the whole result of all-gathers; 0 where ranks do not gather."""
    disk_bytes: float = 0.0
    """Read from the node's disks, by all ranks together."""
    launches: int = 0
    """Host time of the engine itself, in kernel launches of a model."""
    link_share: float = 1.0
    """The part of the link's rate that the engine's copies reach."""


CountTransfers = Callable[[Anatomy, Choice, Sequence[Walk], int, EngineFigures], Transfers]
"""Of a pass that visits these layers, by the number of ranks and the rates that engines reach."""


def placed_transfers(
    anatomy: Anatomy, choice: Choice, visited: Sequence[Walk], world_size: int, figures: EngineFigures
) -> Transfers:
    """Count for an engine that is told where each layer rests: those on the GPU stay there, the others are copied
    once."""
    streamed = sum(walk.streamed_bytes for walk in visited)
    parts = world_size if choice.fetch == "partitioned" else 1
    return Transfers(
        link_bytes=0 if choice.offload == "none" else streamed // parts,
        gathered_bytes=streamed if parts > 1 else 0,
        disk_bytes=sum(walk.nvme_bytes for walk in visited) * world_size / parts,
    )


def no_transfers(
    anatomy: Anatomy, choice: Choice, visited: Sequence[Walk], world_size: int, figures: EngineFigures
) -> Transfers:
    """Count for an engine whose weights all stay on the GPUs."""
    return Transfers(link_bytes=0)
