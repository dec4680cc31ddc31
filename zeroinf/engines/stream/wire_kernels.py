"""The GPU's kernel for expansion. Only a process that needs it imports this: Triton comes with torch for CUDA alone."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from zeroinf.compat.launches import Launch
from zeroinf.planner.wire import Codes

_WEIGHTS_A_PROGRAM = 4096


# Triton looks annotations up while it compiles, and knows none of Python's types. Any number of groups is one kernel.
@Launch
@triton.jit(do_not_specialize=["groups"])  # type: ignore[untyped-decorator]
def _decode(codes, scales, weights, groups, bits: tl.constexpr, group: tl.constexpr, rows: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    inside = (row < groups)[:, None]
    scale = tl.load(scales + row, mask=row < groups).to(tl.float32)[:, None]
    if bits == 8:
        at = row[:, None] * group + tl.arange(0, group)[None, :]
        code = tl.load(codes + at, mask=inside).to(tl.int32) - 128
        tl.store(weights + at, (code.to(tl.float32) * scale).to(weights.dtype.element_ty), mask=inside)
    else:
        column = tl.arange(0, group // 2)[None, :]
        pair = tl.load(codes + row[:, None] * (group // 2) + column, mask=inside).to(tl.int32)
        low, high = (pair & 15) - 8, (pair >> 4) - 8
        at = row[:, None] * group + column
        tl.store(weights + at, (low.to(tl.float32) * scale).to(weights.dtype.element_ty), mask=inside)
        tl.store(weights + at + group // 2, (high.to(tl.float32) * scale).to(weights.dtype.element_ty), mask=inside)


def decode_on_gpu(codes: torch.Tensor, scales: torch.Tensor, kind: Codes, weights: torch.Tensor) -> None:
    """Decode as `codes.decode` does, bit for bit, with one kernel on the current stream."""
    rows = _WEIGHTS_A_PROGRAM // kind.group
    groups = scales.numel()
    _decode((-(-groups // rows),), (codes, scales, weights), (groups,), bits=kind.bits, group=kind.group, rows=rows)
