"""Which tensors move with which block, and where in the model each is used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import Module, Parameter

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


def sort_tensors(model: Any) -> tuple[list[list[Tensor]], list[Tensor]]:
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
