"""Which engine runs a plan."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch

from zeroinf.distributed.control import Control
from zeroinf.engines.base import Engine, Listener
from zeroinf.model.source import ModelSource
from zeroinf.planner.plan import Plan

EngineName = Literal["stream", "zero"]
ENGINE_NAMES: tuple[str, ...] = get_args(EngineName)


def load_engine(
    plan: Plan,
    source: ModelSource,
    zero_config: dict[str, Any] | None,
    control: Control,
    device: torch.device,
    told: Listener,
) -> Engine:
    """Load the plan's engine, and tell `told` how it goes. Only its own libraries are imported."""
    if plan.engine == "zero":
        from zeroinf.engines.zero.engine import ZeroEngine

        assert zero_config is not None
        return ZeroEngine(plan, source, zero_config, control.world)
    from zeroinf.engines.stream.engine import StreamEngine

    return StreamEngine(plan, source, control, device, told)
