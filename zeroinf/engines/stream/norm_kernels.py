"""The GPU's kernel for RMS norms. Only a process that needs it imports this: Triton comes with torch for CUDA alone."""

# ruff: noqa: N803  constants of a kernel are written large

from __future__ import annotations

import torch
import triton
import triton.language as tl

from zeroinf.compat.launches import Launch

_ELEMENTS_A_PROGRAM = 2048


# Triton looks annotations up while it compiles, and knows none of Python's types.
@Launch
@triton.jit(do_not_specialize=["rows", "eps"])  # type: ignore[untyped-decorator]
def _rms_norm(  # type: ignore[no-untyped-def]
    x, weight, out, rows, width, eps,
    ROUNDS_FIRST: tl.constexpr, ADDS_ONE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    at = row[:, None] * width + column[None, :]
    value = tl.load(x + at, mask=inside, other=0).to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value, 1) / width + eps)[:, None]
    scale = tl.load(weight + column, mask=column < width, other=0).to(tl.float32)
    if ROUNDS_FIRST:
        value = value.to(out.dtype.element_ty).to(tl.float32)
    if ADDS_ONE:
        scale += 1.0
    tl.store(out + at, (value * scale[None, :]).to(out.dtype.element_ty), mask=inside)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, *, rounds_first: bool, adds_one: bool) -> torch.Tensor:
    """`x` (..., width), contiguous, over the root of its mean square, times `weight` (width,), or one more than that.

    `rounds_first`: it is rounded to the dtype of `x` before it is multiplied, too.
    """
    out = torch.empty_like(x)
    width = x.shape[-1]
    wide = 1 << (width - 1).bit_length()  # Triton's own function takes microseconds
    together = max(1, _ELEMENTS_A_PROGRAM // wide)
    rows = x.numel() // width
    _rms_norm(
        (-(-rows // together),), (x, weight, out), (rows, width, eps),
        ROUNDS_FIRST=rounds_first, ADDS_ONE=adds_one, ROWS=together, WIDTH=wide, num_warps=4 if wide <= 4096 else 8,
    )  # fmt: skip
    return out
