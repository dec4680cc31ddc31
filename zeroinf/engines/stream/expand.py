"""Expansion: a block that crossed the link as codes computes with them, or becomes weights again in one slot."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from zeroinf.engines.stream.coded_weight import CodedWeight, Decode, Product
from zeroinf.engines.stream.codes import decode
from zeroinf.engines.stream.tensor_groups import Tensor, TensorGroup
from zeroinf.errors import EnvironmentProblem
from zeroinf.planner.wire import Codes


class Expander:
    """The expanded slot: device memory for the largest block in full.

    Where products run on codes, weights lie there in full only if something asks for them.
    One is enough: it is filled on the stream that computes, after the block before has been used and before the next
    one is. So a piece may be overwritten as soon as what is enqueued by then is done.
    """

    def __init__(self, groups: Sequence[TensorGroup], device: torch.device) -> None:
        """Raises EnvironmentProblem where the GPU's kernel cannot be built."""
        self._decode = decode if device.type == "cpu" else _gpu_decode(device)
        self._product = product_on_codes(device, groups)
        self.slot = torch.empty(max(group.layout.nbytes for group in groups), dtype=torch.uint8, device=device)

    @property
    def multiplies_codes(self) -> bool:
        """Whether products run on codes."""
        return self._product is not None

    def views(self, group: TensorGroup) -> list[tuple[Tensor, torch.Tensor]]:
        """Each tensor of a block with what stands for it from now on, whichever piece `expand` is given."""
        return [
            (tensor, CodedWeight(group.layout, place, self.slot, self._decode, self._product))
            if self._product is not None and group.layout.is_coded(place)
            else (tensor, tensor.like(place.view(self.slot)))
            for tensor, place in zip(group.tensors, group.layout.locations, strict=True)
        ]

    def expand(self, group: TensorGroup, wire_piece: torch.Tensor) -> None:
        """Let the block compute that lies in `wire_piece` (uint8, on the device)."""
        layout = group.layout
        coded = [tensor.bound for tensor in group.tensors if isinstance(tensor.bound, CodedWeight)]
        for weight in coded:
            weight.hold(wire_piece)
        if layout.coded is not None and not coded:
            self._decode(
                layout.codes(wire_piece), layout.scales(wire_piece), layout.coded.kind, layout.weights(self.slot)
            )  # fmt: skip
        layout.rest(self.slot).copy_(layout.wire_rest(wire_piece))


def product_on_codes(device: torch.device, groups: Sequence[TensorGroup]) -> Product | None:
    """The kernel that multiplies by the codes of `groups`; None where weights are expanded: on a CPU, on GPUs before
    Ampere, in float32, whose products are exact, and where the kernel does not run, of which a warning is logged."""
    kinds = {group.layout.coded for group in groups if group.layout.coded is not None}
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    forms = {(coded.dtype, coded.kind) for coded in kinds}
    if not forms or not {dtype for dtype, _ in forms} <= {torch.bfloat16, torch.float16}:
        return None
    from zeroinf.engines.stream.product_kernels import product, why_not

    for dtype, kind in forms:
        reason = why_not(device, dtype, kind.bits, kind.group)
        if reason:
            logging.getLogger(__name__).warning("weights are expanded before products, whose kernels fail: %s", reason)
            return None
    torch.cuda.empty_cache()
    return product


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
