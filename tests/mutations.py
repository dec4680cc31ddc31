"""Checkpoints that lack a tensor, or hold it under another name, in another shape, or twice."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]


def rewritten(folder: Path, to: Path, change: Callable[[Tensors], Any], **config: Any) -> Path:
    """A copy of the checkpoint `folder` at `to`, whose tensors `change` was let alter; `config` replaces fields of its
    config, or removes those that are None."""
    to.mkdir(parents=True)
    for file in folder.iterdir():
        if file.name != "model.safetensors":
            shutil.copy(file, to)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    fields = {**json.loads((to / "config.json").read_text()), **config}
    (to / "config.json").write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))
    return to


def removed(tensors: Tensors, name: str) -> None:
    del tensors[name]


def renamed(tensors: Tensors, name: str) -> None:
    stem, _, leaf = name.rpartition(".")
    tensors[f"{stem}.other_{leaf}" if stem else f"other_{leaf}"] = tensors.pop(name)


def cut(tensors: Tensors, name: str) -> None:
    tensors[name] = tensors[name][: tensors[name].shape[0] - 1].clone() if tensors[name].dim() else tensors[name][None]


def doubled(tensors: Tensors, name: str, other: str) -> None:
    """Store `name` under the name `other`, too, with other values."""
    value = tensors[name]
    tensors[other] = value.flip(0).contiguous() + (0.1 if value.is_floating_point() else 1)


def other_names(name: str, prefix: str, tied: dict[str, str]) -> list[str]:
    """Names under which `name` may be stored, too: those that it is tied to, and with or without the model's prefix."""
    plain = name.removeprefix(f"{prefix}.")
    source = tied.get(name, name)
    tied_to = {source, *(target for target, of in tied.items() if of == source)} - {name}
    return [*sorted(tied_to), plain if plain != name else f"{prefix}.{name}"]
