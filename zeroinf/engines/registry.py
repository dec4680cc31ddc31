"""Which engine runs a plan."""

from __future__ import annotations

from typing import Any

import torch

from zeroinf.distributed.control import Control
from zeroinf.engines.base import Engine, Listener
from zeroinf.model.pretrained import reading_weights
from zeroinf.model.source import ModelSource
from zeroinf.planner.plan import Plan


def load_engine(
    plan: Plan,
    source: ModelSource,
    zero_config: dict[str, Any] | None,
    control: Control,
    device: torch.device,
    told: Listener,
) -> Engine:
    """Load the plan's engine, and tell `told` how it goes. Only its own libraries are imported.

    Raises ModelError for weights that are damaged, or that would run code, whichever engine reads them.
    """
    with reading_weights(source):
        return _load(plan, source, zero_config, control, device, told)


def _load(
    plan: Plan,
    source: ModelSource,
    zero_config: dict[str, Any] | None,
    control: Control,
    device: torch.device,
    told: Listener,
) -> Engine:
    match plan.engine:
        case "zero":
            from zeroinf.engines.zero.engine import ZeroEngine

            assert zero_config is not None
            return ZeroEngine(plan, source, zero_config, control.world)
        case "resident":
            from zeroinf.engines.baselines.resident import ResidentEngine

            return ResidentEngine(plan, source, device)
        case "accelerate":
            from zeroinf.engines.baselines.offloaded import AccelerateEngine

            return AccelerateEngine(plan, source, device)
        case "tensor-parallel":
            from zeroinf.engines.baselines.tensor_parallel import TensorParallelEngine

            return TensorParallelEngine(plan, source, control, device, told)
    from zeroinf.engines.stream.engine import StreamEngine

    return StreamEngine(plan, source, control, device, told)
