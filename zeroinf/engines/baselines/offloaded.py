"""Runs a model with accelerate's device map: hooks copy each layer that is not on the GPU there when it runs."""

from __future__ import annotations

from typing import Any

import torch

from zeroinf.engines.baselines.plain import PlainEngine, random_model
from zeroinf.engines.scratch import ScratchFolder
from zeroinf.model.inspect import find_blocks
from zeroinf.model.pretrained import load_pretrained
from zeroinf.model.skeleton import build_skeleton
from zeroinf.model.source import ModelSource
from zeroinf.planner.plan import Plan


class AccelerateEngine(PlainEngine):
    """`from_pretrained(device_map=...)` with CPU or disk offload.

    The map is what `device_map="auto"` makes of a memory limit: the first blocks on the GPU, the rest behind it; how
    many is the plan's choice. Several ranks have a copy each, of the weights in host memory, too.
    """

    name = "accelerate"

    def __init__(self, plan: Plan, source: ModelSource, device: torch.device) -> None:
        self._folder = ScratchFolder(plan.nvme_paths[0]) if plan.offload == "nvme" else None
        try:
            self.model = self._load(plan, source, device)
        except BaseException:
            self.close()
            raise
        rests_elsewhere = plan.offload == "nvme" or device.type == "cuda"
        moved = plan.anatomy.blocks[plan.resident_blocks :] if rests_elsewhere else ()
        self._streamed_bytes = sum(block.nbytes for block in moved)

    def _load(self, plan: Plan, source: ModelSource, device: torch.device) -> Any:
        places = _device_map(source, plan, device)
        folder = None if self._folder is None else self._folder.path
        if not source.random_weights:
            dtype = getattr(torch, plan.dtype)
            return load_pretrained(source, dtype, device_map=places, offload_folder=folder)
        from accelerate import dispatch_model

        made = {name: torch.device("cpu" if place == "disk" else place) for name, place in places.items()}
        model = random_model(plan, source, device, made)
        if len(set(places.values())) == 1:
            return model
        return dispatch_model(model, places, main_device=_own_name(device), offload_dir=folder)

    def close(self) -> None:
        super().close()
        if self._folder is not None:
            self._folder.remove()


def _device_map(source: ModelSource, plan: Plan, device: torch.device) -> dict[str, Any]:
    """The device of each module, as accelerate's `device_map` names it. Modules outside the blocks stay on the
    device."""
    model = build_skeleton(source, plan.dtype)
    path, blocks = find_blocks(model)
    elsewhere = "disk" if plan.offload == "nvme" else "cpu"
    places: dict[str, Any] = dict.fromkeys(_modules_beside(model, path), _own_name(device))
    for index in range(len(blocks)):
        places[f"{path}.{index}"] = _own_name(device) if index < plan.resident_blocks else elsewhere
    return places


def _own_name(device: torch.device) -> int | str:
    return "cpu" if device.type == "cpu" else int(device.index)


def _modules_beside(model: torch.nn.Module, path: str) -> list[str]:
    """The largest modules that hold nothing of `path`, in the order of the model."""
    found: list[str] = []
    for name, child in model.named_children():
        if path == name:
            continue
        if path.startswith(f"{name}."):
            found += [f"{name}.{inner}" for inner in _modules_beside(child, path.removeprefix(f"{name}."))]
        else:
            found.append(name)
    return found
