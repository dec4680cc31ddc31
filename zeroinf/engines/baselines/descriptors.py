"""Describes the baselines to the planner, the options and the runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zeroinf.engines.baselines.baseline_memory import memory_terms
from zeroinf.model.anatomy import Anatomy
from zeroinf.planner.choice import Choice
from zeroinf.planner.descriptor import EngineDescriptor
from zeroinf.planner.figures import EngineFigures
from zeroinf.planner.memory import pieces
from zeroinf.planner.plan import Plan
from zeroinf.planner.transfers import Transfers, no_transfers
from zeroinf.planner.walks import Walk


def _load_resident(plan: Plan, source: Any, zero_config: Any, control: Any, device: Any, listener: Any) -> Any:
    from zeroinf.engines.baselines.resident import ResidentEngine

    return ResidentEngine(plan, source, device)


def _load_accelerate(plan: Plan, source: Any, zero_config: Any, control: Any, device: Any, listener: Any) -> Any:
    from zeroinf.engines.baselines.offloaded import AccelerateEngine

    return AccelerateEngine(plan, source, device)


def _load_tensor_parallel(plan: Plan, source: Any, zero_config: Any, control: Any, device: Any, listener: Any) -> Any:
    from zeroinf.engines.baselines.tensor_parallel import TensorParallelEngine

    return TensorParallelEngine(plan, source, control, device, listener)


def _accelerate_transfers(
    anatomy: Anatomy, choice: Choice, visited: Sequence[Walk], world_size: int, figures: EngineFigures
) -> Transfers:
    """The first layers stay on the GPU, the others rest in one place; each process copies for itself."""
    moved = sum(pieces(anatomy)[choice.resident_blocks :])
    return Transfers(
        link_bytes=moved,
        disk_bytes=moved * world_size if choice.offload == "nvme" else 0,
        link_share=figures.accelerate_link_share,
    )


RESIDENT = EngineDescriptor(
    name="resident",
    load=_load_resident,
    memory_terms=memory_terms,
    transfers=no_transfers,
    offloads=("none",),
    options=frozenset({"share_prefixes"}),
    packs=True,
    is_replayed=True,
)

ACCELERATE = EngineDescriptor(
    name="accelerate",
    load=_load_accelerate,
    memory_terms=memory_terms,
    transfers=_accelerate_transfers,
    offloads=("none", "cpu", "nvme"),
    options=frozenset({"resident_blocks"}),
    libraries=("accelerate",),
    places_blocks=True,
    overlaps=False,
)

TENSOR_PARALLEL = EngineDescriptor(
    name="tensor-parallel",
    load=_load_tensor_parallel,
    memory_terms=memory_terms,
    transfers=no_transfers,
    offloads=("none",),
    options=frozenset({"tensor_parallel", "tensor_parallel_size"}),
    libraries=("deepspeed",),
    is_timed=False,
)
