"""Expansion: a block that crossed the link as codes computes with them, or becomes weights again in one slot."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import replace
from typing import Any

import torch

from zeroinf.engines.stream.coded_weight import CodedWeight, Decode, Product
from zeroinf.engines.stream.codes import decode
from zeroinf.engines.stream.layout import TensorLocation
from zeroinf.engines.stream.tensor_groups import Tensor, TensorGroup
from zeroinf.errors import EnvironmentProblem
from zeroinf.planner.memory import ALIGNMENT, round_up
from zeroinf.planner.wire import Codes, experts_are_expanded


class Expander:
    """The expanded slot: device memory for the largest block in full.

    One is enough: it is filled on the stream that computes, after the block before has been used and before the next
    one is. So a piece may be overwritten as soon as what is enqueued by then is done. Where products run on codes,
    weights lie there in full only if something asks for them, and those of experts one after the other.
    """

    def __init__(
        self,
        groups: Sequence[TensorGroup],
        device: torch.device,
        product: Product | None = None,
        passing: Container[str] = (),
    ) -> None:
        """`product` multiplies by codes; without one, weights are expanded before products. The tensors `passing` are
        in full for a product at a time, in a place that they share, or never.

        Raises EnvironmentProblem where the GPU's kernel cannot be built.
        """
        self.decode: Decode = decode if device.type == "cpu" else _gpu_decode(device)
        self.product = product
        self._passing = passing if product is not None else ()
        own = max(group.layout.nbytes - self._left_out(group, group.layout.end) for group in groups)
        shared = [at.nbytes for group in groups for at in self._shared(group) if _has_place(group)]
        self.slot = torch.empty(own + max(shared, default=0), dtype=torch.uint8, device=device)
        self._shared_at = own

    def _shared(self, group: TensorGroup) -> list[TensorLocation]:
        """The tensors that lie in the shared place."""
        places = zip(group.tensors, group.layout.locations, strict=True)
        return [at for tensor, at in places if tensor.names[0] in self._passing and group.layout.is_coded(at)]

    def _left_out(self, group: TensorGroup, end: int) -> int:
        """Bytes before `end` of the piece in full that have no place of their own in the slot."""
        return sum(round_up(at.nbytes, ALIGNMENT) for at in self._shared(group) if at.offset < end)

    def on(self, group: TensorGroup) -> ExpandedGroup:
        """What modules use in place of the tensors of `group`, one of those that the slot has room for."""
        return ExpandedGroup(group, self._views(group), self._rest(group), self)

    def _views(self, group: TensorGroup) -> list[tuple[Tensor, torch.Tensor]]:
        views: list[tuple[Tensor, torch.Tensor]] = []
        for tensor, place in zip(group.tensors, group.layout.locations, strict=True):
            at = place.offset - self._left_out(group, place.offset)
            if self.product is None or not group.layout.is_coded(place):
                views.append((tensor, tensor.like(replace(place, offset=at).view(self.slot))))
                continue
            passing = tensor.names[0] in self._passing
            slot = self.slot[self._shared_at if passing else at :] if not passing or _has_place(group) else None
            weight = CodedWeight(group.layout, place, slot, self.decode, self.product, self.slot.device, passing)
            views.append((tensor, weight))
        return views

    def _rest(self, group: TensorGroup) -> torch.Tensor:
        """Where what crosses as it is lies in the slot."""
        left_out = self._left_out(group, group.layout.end)
        rest = group.layout.rest_range
        return self.slot[rest.start - left_out : rest.stop - left_out]


class ExpandedGroup:
    """Stands for the tensors of a block, whichever piece `fill` was given last."""

    def __init__(
        self,
        group: TensorGroup,
        views: list[tuple[Tensor, torch.Tensor]],
        rest: torch.Tensor,
        expander: Expander,
    ) -> None:
        self._layout, self._rest, self._expander = group.layout, rest, expander
        self.views = views
        """Each tensor with what stands for it."""
        self._coded = [view for _, view in views if isinstance(view, CodedWeight)]
        self._rests: dict[int, torch.Tensor] = {}
        """What crosses as it is in pieces, by their addresses."""

    def fill(self, wire_piece: torch.Tensor) -> None:
        """Let the block compute that lies in `wire_piece` (uint8, on the device)."""
        layout, address = self._layout, wire_piece.data_ptr()
        for weight in self._coded:
            weight.hold(wire_piece)
        if layout.coded is not None and not self._coded:
            codes, scales = layout.codes(wire_piece), layout.scales(wire_piece)
            self._expander.decode(codes, scales, layout.coded.kind, layout.weights(self._expander.slot))
        if address not in self._rests:
            self._rests[address] = layout.wire_rest(wire_piece)
        self._rest.copy_(self._rests[address])


def _has_place(group: TensorGroup) -> bool:
    """Whether passing tensors of `group` have a place in the slot."""
    return group.layout.coded is not None and experts_are_expanded(group.layout.coded.kind)


def _gpu_decode(device: torch.device) -> Decode:
    """The kernel, built by using it once on next to nothing."""
    try:
        from zeroinf.engines.stream.wire_kernels import decode_on_gpu

        for bits in (4, 8):
            kind = Codes(bits, 32)
            codes = torch.zeros(kind.nbytes(32), dtype=torch.uint8, device=device)
            scales = torch.zeros(1, dtype=torch.bfloat16, device=device)
            decode_on_gpu(codes, scales, kind, torch.empty(32, dtype=torch.bfloat16, device=device))
    except (ImportError, RuntimeError, OSError) as error:
        raise EnvironmentProblem(
            f"weights cannot be expanded on this GPU: {str(error).splitlines()[0]}",
            hint="Triton needs a C compiler (apt install gcc); or --wire model",
        ) from error
    decode_anywhere: Any = decode_on_gpu
    return decode_anywhere  # type: ignore[no-any-return]
