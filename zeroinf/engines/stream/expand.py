"""Expansion: a block that crossed the link as codes becomes weights again in the one slot where such blocks compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from zeroinf.engines.stream.codes import decode
from zeroinf.engines.stream.tensor_groups import TensorGroup
from zeroinf.errors import EnvironmentProblem
from zeroinf.planner.wire import Codes

Decode = Callable[[torch.Tensor, torch.Tensor, Codes, torch.Tensor], None]


class Expander:
    """The expanded slot: device memory for the largest block in full.

    One is enough: it is filled on the stream that computes, after the block before has been used and before the next
    one is. So a piece may be overwritten as soon as what is enqueued by then is done.
    """

    def __init__(self, groups: Sequence[TensorGroup], device: torch.device) -> None:
        """Raises EnvironmentProblem where the GPU's kernel cannot be built."""
        self._decode = decode if device.type == "cpu" else _gpu_decode(device)
        self.slot = torch.empty(max(group.layout.nbytes for group in groups), dtype=torch.uint8, device=device)

    def expand(self, group: TensorGroup, wire_piece: torch.Tensor) -> None:
        """Fill the slot with the block that lies in `wire_piece` (uint8, on the device), laid out in full."""
        layout = group.layout
        if layout.coded is not None:
            self._decode(
                layout.codes(wire_piece), layout.scales(wire_piece), layout.coded.kind, layout.weights(self.slot)
            )  # fmt: skip
        layout.rest(self.slot).copy_(layout.wire_rest(wire_piece))


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
