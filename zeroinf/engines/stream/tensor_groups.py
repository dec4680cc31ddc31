"""Groups a model's tensors: one group for each block, and one for everything outside the blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.nn import Module, Parameter

from zeroinf.compat.modules import own_buffers, own_parameters, unsaved_buffers
from zeroinf.engines.stream.layout import Layout, lay_out
from zeroinf.engines.stream.write_target import WriteTarget
from zeroinf.model.anatomy import Experts, TensorSpec, expert_ranges
from zeroinf.model.inspect import find_stacks, home_of
from zeroinf.model.stored_parts import parts_of, set_parts
from zeroinf.planner.wire import CODES, Codes, Wire, is_coded


@dataclass(slots=True, eq=False)
class Tensor:
    """One parameter or buffer, which several modules may share."""

    value: torch.Tensor
    """Parameters are on the meta device, buffers hold what the model made."""
    names: list[str] = field(default_factory=list)
    """Full dotted names, in the order of `named_parameters`."""
    sites: list[tuple[Module, str]] = field(default_factory=list)
    stored: bool = False
    """Checkpoints hold it: a parameter or a persistent buffer."""
    entries: range | None = None
    """It is these entries of the first dimension of what a checkpoint holds; None: all."""
    of: int = 0
    """The number of all entries there, where it is some."""

    def some(self, entries: range) -> Tensor:
        """These entries of the first dimension of this tensor, as one of its own."""
        value = self.like(self.value[entries.start : entries.stop].detach())
        if parts_of(self.value) is not None:
            set_parts(value, parts_of(self.value) or ())
        return replace(self, value=value, entries=entries, of=self.value.shape[0])

    @property
    def is_parameter(self) -> bool:
        return isinstance(self.value, Parameter)

    def bind(self, value: torch.Tensor) -> None:
        """Let every module that uses this tensor use `value` instead (a Parameter for a parameter)."""
        for module, name in self.sites:
            own: dict[str, Any] = own_parameters(module) if self.is_parameter else own_buffers(module)
            own[name] = value

    def like(self, view: torch.Tensor) -> torch.Tensor:
        """`view` as what this tensor is: a plain tensor, or a Parameter.

        That one takes gradients as the model's own does, though none is ever computed: torch multiplies the last
        positions of prompts by a weight that takes none row by row (`should_fold` in aten's LinearAlgebra.cpp).
        """
        return Parameter(view, requires_grad=self.value.requires_grad) if self.is_parameter else view


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """Tensors that are stored and transferred as one contiguous piece, and their locations in it."""

    tensors: tuple[Tensor, ...]
    layout: Layout
    block: int | None = None
    """The index of the block that the tensors lie in; None outside."""
    entries: range | None = None
    """The block's experts that the tensors belong to; None: no experts, or all."""
    of: int = 0
    """The number of the block's experts, where they are split."""

    @property
    def nbytes(self) -> int:
        """Bytes of the piece as it rests and crosses the link."""
        return self.layout.wire_bytes

    def views(self, piece: torch.Tensor) -> list[tuple[Tensor, torch.Tensor]]:
        """Each tensor with its memory in `piece` (uint8, in full)."""
        return [(t, place.view(piece)) for t, place in zip(self.tensors, self.layout.locations, strict=True)]

    def targets(self, wire_piece: torch.Tensor, device: torch.device) -> list[tuple[Tensor, WriteTarget]]:
        """Each tensor with where it is written in a piece as it crosses the link (uint8, `nbytes`).

        Codes are made on `device`.
        """
        places = self.layout.locations
        return [
            (t, WriteTarget(self.layout, place, wire_piece, device))
            for t, place in zip(self.tensors, places, strict=True)
        ]


def group_tensors(
    model: Any, wire: Wire = "model", apart: Sequence[str] = (), experts: Sequence[Experts] = (), parts: int = 1
) -> tuple[tuple[TensorGroup, ...], TensorGroup, tuple[TensorGroup, ...]]:
    """A group for each block, whose weights cross in the format `wire`, one of what lies outside, as it is, and one for
    each of the tensors `apart`, which are part of none of these. The `experts` of a block follow it in so many `parts`,
    each a group, if there are to be more than one."""
    inside, outside = _sort_tensors(model)
    dtype = str(model.dtype).removeprefix("torch.")
    named = {tensor.names[0]: (index, tensor) for index, own in enumerate([*inside, outside]) for tensor in own}
    own_groups = []
    for name in apart:
        index, tensor = named[name]
        own_groups.append(_tensor_group([tensor], index if index < len(inside) else None))
        (inside[index] if index < len(inside) else outside).remove(tensor)
    coded = (is_coded([_spec(tensor) for tensor in tensors], dtype, wire) for tensors in inside)
    split = {one.block: one for one in experts} if parts > 1 else {}
    blocks = list[TensorGroup]()
    for index, (tensors, which) in enumerate(zip(inside, coded, strict=True)):
        pairs = list(zip(tensors, which, strict=True))
        if index not in split:
            blocks.append(_tensor_group(tensors, index, CODES.get(wire), which))
            continue
        owned = [(tensor, code) for tensor, code in pairs if tensor.names[0] in split[index].tensors]
        rest = [(tensor, code) for tensor, code in pairs if tensor.names[0] not in split[index].tensors]
        count = split[index].count
        blocks.append(_tensor_group([t for t, _ in rest], index, CODES.get(wire), [code for _, code in rest], of=count))
        for some in expert_ranges(count, parts):
            own = [tensor.some(some) for tensor, _ in owned]
            codes = [code for _, code in owned]
            blocks.append(_tensor_group(own, index, CODES.get(wire), codes, some, count))
    return tuple(blocks), _tensor_group(outside), tuple(own_groups)


def _tensor_group(
    tensors: Sequence[Tensor],
    block: int | None = None,
    kind: Codes | None = None,
    coded: Sequence[bool] = (),
    entries: range | None = None,
    of: int = 0,
) -> TensorGroup:
    layout = lay_out([tensor.value for tensor in tensors], kind, coded)
    return TensorGroup(tuple(tensors), layout, block, entries, of)


def _spec(tensor: Tensor) -> TensorSpec:
    return TensorSpec(
        name=tensor.names[0],
        shape=tuple(tensor.value.shape),
        dtype=str(tensor.value.dtype).removeprefix("torch."),
        is_buffer=not tensor.is_parameter,
    )


def _sort_tensors(model: Any) -> tuple[list[list[Tensor]], list[Tensor]]:
    """The tensors of each block, and those outside; a tensor that two blocks share moves with neither."""
    stacks = find_stacks(model)
    tensors: dict[int, Tensor] = {}
    for prefix, module in model.named_modules():
        own: Sequence[tuple[str, torch.Tensor | None]] = (*own_parameters(module).items(), *own_buffers(module).items())
        for name, value in own:
            if value is None:
                continue
            tensor = tensors.setdefault(id(value), Tensor(value))
            tensor.names.append(f"{prefix}.{name}" if prefix else name)
            tensor.sites.append((module, name))
            tensor.stored |= name not in unsaved_buffers(module)
    inside: list[list[Tensor]] = [[] for _, layers in stacks for _ in layers]
    outside: list[Tensor] = []
    for tensor in tensors.values():
        homes = {home_of(name, stacks) for name in tensor.names}
        home = homes.pop() if len(homes) == 1 else None
        (outside if home is None else inside[home]).append(tensor)
    return inside, outside
