"""Counts what a pass of DeepSpeed's ZeRO-3 engine moves: each rank pulls a part of all weights and gathers the rest."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from zeroinf.model.anatomy import Anatomy
from zeroinf.planner.choice import Choice
from zeroinf.planner.figures import EngineFigures
from zeroinf.planner.memory import piece_bytes
from zeroinf.planner.transfers import Transfers
from zeroinf.planner.walks import Walk


def zero_transfers(
    anatomy: Anatomy, choice: Choice, visited: Sequence[Walk], world_size: int, figures: EngineFigures
) -> Transfers:
    """No layer stays on the GPU, and weights outside the layers are fetched as they are."""
    outside = piece_bytes(anatomy.outside) + _tied_bytes(anatomy)
    passing = sum(walk.nbytes for walk in visited) + outside
    from_disk = sum(walk.nvme_bytes for walk in visited) + (outside if choice.offload == "nvme" else 0)
    launches = figures.deepspeed_launches if world_size == 1 else figures.deepspeed_gathered_launches
    return Transfers(
        link_bytes=0 if choice.offload == "none" else passing // world_size,
        gathered_bytes=passing if world_size > 1 else 0,
        disk_bytes=from_disk,
        launches=_parameters(anatomy) * launches,
    )


def _tied_bytes(anatomy: Anatomy) -> int:
    """Bytes of tied weights, which are fetched twice: DeepSpeed's engine has let them go by their second use."""
    sizes = {tensor.name: tensor.nbytes for tensor in anatomy.outside}
    return sum(sizes.get(canonical, 0) for _, canonical in anatomy.tied)


@lru_cache(maxsize=16)
def _parameters(anatomy: Anatomy) -> int:
    """The number of tensors of weights."""
    return sum(not tensor.is_buffer for tensor in anatomy.tensors())
