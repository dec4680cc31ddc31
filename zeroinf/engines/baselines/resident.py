"""Runs the whole model on one GPU, or on the CPU, with plain transformers."""

from __future__ import annotations

import torch

from zeroinf.engines.baselines.plain import PlainEngine, random_model
from zeroinf.model.pretrained import load_pretrained
from zeroinf.model.source import ModelSource
from zeroinf.planner.plan import Plan


class ResidentEngine(PlainEngine):
    """`from_pretrained` straight onto the device. Several ranks have a copy each."""

    name = "resident"

    def __init__(self, plan: Plan, source: ModelSource, device: torch.device) -> None:
        if source.random_weights:
            self.model = random_model(plan, source, device)
        else:
            self.model = load_pretrained(source, getattr(torch, plan.dtype), device_map={"": device})
