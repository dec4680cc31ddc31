"""Which tensors move with which block, and where in the model each is used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import Module, Parameter

from zeroinf.engines.stream.layout import Layout, lay_out
from zeroinf.model.inspect import find_blocks


@dataclass(slots=True)
class Tensor:
    """One parameter or buffer, however many modules share it."""

    value: torch.Tensor
    """Parameters are on the meta device, buffers hold what the model made."""
    names: list[str] = field(default_factory=list)
    """Full dotted names, in the order of `named_parameters`."""
    sites: list[tuple[Module, str]] = field(default_factory=list)
    stored: bool = False
    """Checkpoints hold it: a parameter or a persistent buffer."""

    @property
    def is_parameter(self) -> bool:
        return isinstance(self.value, Parameter)

    def bind(self, value: torch.Tensor) -> None:
        """Let every module that uses this tensor use `value` instead (a Parameter for a parameter)."""
        for module, name in self.sites:
            own: dict[str, Any] = module._parameters if self.is_parameter else module._buffers
            own[name] = value

    def like(self, view: torch.Tensor) -> torch.Tensor:
        """`view` as what this tensor is: a Parameter or a plain tensor."""
        return Parameter(view, requires_grad=False) if self.is_parameter else view


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors that move as one piece, and their places in it."""

    tensors: tuple[Tensor, ...]
    layout: Layout

    @property
    def nbytes(self) -> int:
        return self.layout.nbytes

    def views(self, piece: torch.Tensor) -> list[tuple[Tensor, torch.Tensor]]:
        """Each tensor with its memory in `piece` (uint8, at least `nbytes`)."""
        return [(t, place.view(piece)) for t, place in zip(self.tensors, self.layout.places, strict=True)]


def group_tensors(model: Any) -> tuple[tuple[Group, ...], Group]:
    """A group for each block, and one of what lies outside."""
    inside, outside = _sort_tensors(model)
    *blocks, rest = (Group(tuple(tensors), lay_out(t.value for t in tensors)) for tensors in (*inside, outside))
    return tuple(blocks), rest


def _sort_tensors(model: Any) -> tuple[list[list[Tensor]], list[Tensor]]:
    """The tensors of each block, and those outside; a tensor that two blocks share moves with neither."""
    path, blocks = find_blocks(model)
    tensors: dict[int, Tensor] = {}
    for prefix, module in model.named_modules():
        own: Sequence[tuple[str, torch.Tensor | None]] = (*module._parameters.items(), *module._buffers.items())
        for name, value in own:
            if value is None:
                continue
            tensor = tensors.setdefault(id(value), Tensor(value))
            tensor.names.append(f"{prefix}.{name}" if prefix else name)
            tensor.sites.append((module, name))
            tensor.stored |= name not in module._non_persistent_buffers_set
    inside: list[list[Tensor]] = [[] for _ in blocks]
    outside: list[Tensor] = []
    for tensor in tensors.values():
        homes = {_home(name, path) for name in tensor.names}
        home = homes.pop() if len(homes) == 1 else None
        (outside if home is None else inside[home]).append(tensor)
    return inside, outside


def _home(name: str, path: str) -> int | None:
    """The index of the block that the tensor `name` lies in."""
    if not name.startswith(f"{path}."):
        return None
    return int(name.removeprefix(f"{path}.").partition(".")[0])
