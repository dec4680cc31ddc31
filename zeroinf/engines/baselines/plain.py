"""Base class of the baselines: an unmodified transformers model whose forwards run one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from zeroinf.compat.modules import own_buffers, own_parameters
from zeroinf.engines.base import EngineStats
from zeroinf.model.skeleton import build_skeleton
from zeroinf.model.source import ModelSource
from zeroinf.planner.plan import Plan

_RANDOM_SCALE = 0.02
_RANDOM_SEED = 0


class PlainEngine:
    """Runs the forward of a loaded transformers model. Ranks are independent."""

    in_step = False
    shares_passes = False
    link_stream = None
    model: Any
    _passes = 0
    _streamed_bytes = 0

    def forward(self, micro_batches: Sequence[Mapping[str, Any]]) -> list[Any]:
        """One forward for each micro-batch, one after the other."""
        self._passes += len(micro_batches)
        with torch.no_grad():
            return [self.model(**inputs) for inputs in micro_batches]

    def recover(self) -> bool:
        return True

    def stats(self) -> EngineStats:
        return EngineStats(passes=self._passes, streamed_bytes_per_pass=self._streamed_bytes)

    def close(self) -> None:
        self.model = None


def random_model(
    plan: Plan, source: ModelSource, device: torch.device, places: Mapping[str, torch.device] | None = None
) -> Any:
    """The model of `source` with random values drawn on `device`; each tensor lies where the longest prefix of its name
    in `places` says, or on `device`."""
    places = {"": device} if places is None else places
    model = build_skeleton(source, plan.dtype)
    made: dict[int, torch.nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for name, own in list(own_parameters(module).items()):
            if own is None:
                continue
            if id(own) not in made:
                generator = torch.Generator(device).manual_seed(_RANDOM_SEED + len(made))
                value = torch.empty(own.shape, dtype=own.dtype, device=device)
                value.normal_(std=_RANDOM_SCALE, generator=generator)
                made[id(own)] = torch.nn.Parameter(value.to(_place_of(f"{prefix}.{name}", places)))
            own_parameters(module)[name] = made[id(own)]
        for name, buffer in list(own_buffers(module).items()):
            if buffer is not None:
                own_buffers(module)[name] = buffer.to(_place_of(f"{prefix}.{name}", places))
    return model


def _place_of(name: str, places: Mapping[str, torch.device]) -> torch.device:
    known = (prefix for prefix in places if not prefix or name.startswith(f"{prefix}."))
    return places[max(known, key=len)]
