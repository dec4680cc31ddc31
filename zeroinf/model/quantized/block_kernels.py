"""The GPU's kernels that expand whole blocks of packed weights into rows that lie side by side.

A program reads some blocks and writes all their weights. Bytes that lie together are read by one thread, and every byte
and scale is read once for all weights that it serves, in place of once for each. What is computed is that of the forms
in torch, to the last bit. Other places than rows are filled by `kernels`.
"""

# ruff: noqa: N803  constants of a kernel are written large

from __future__ import annotations

import torch
import triton
import triton.language as tl

_WEIGHTS_A_PROGRAM = 2048


# Triton looks annotations up while it compiles, and knows none of Python's types.
@triton.jit
def _half(at, inside):  # type: ignore[no-untyped-def]
    """The float16 at an address whose alignment is a byte."""
    bits = tl.load(at, mask=inside, other=0).to(tl.int32) | (tl.load(at + 1, mask=inside, other=0).to(tl.int32) << 8)
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _write(whole, value, inside):  # type: ignore[no-untyped-def]
    tl.store(whole, value.to(whole.dtype.element_ty), mask=inside)


@triton.jit
def _k_scale(at, group, inside):  # type: ignore[no-untyped-def]
    """Scale and minimum of a group of Q4_K and Q5_K, both of six bits."""
    other = group % 4
    one = tl.load(at + 4 + other, mask=inside, other=0).to(tl.int32)
    two = tl.load(at + 8 + other, mask=inside, other=0).to(tl.int32)
    both = tl.load(at + 12 + other, mask=inside, other=0).to(tl.int32)
    scale = tl.where(group < 4, one & 63, (both & 15) | ((one >> 2) & 48)).to(tl.float32)
    least = tl.where(group < 4, two & 63, (both >> 4) | ((two >> 2) & 48)).to(tl.float32)
    return scale, least


@triton.jit  # type: ignore[untyped-decorator]
def _ggml(  # type: ignore[no-untyped-def]
    whole, packed, blocks, across, own_rows, stack_stride, row_stride,
    KIND: tl.constexpr, WEIGHTS: tl.constexpr, NBYTES: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    row = block // across
    to = whole + row // own_rows * stack_stride + row % own_rows * row_stride + block % across * WEIGHTS
    there = block < blocks
    start = packed + block * NBYTES
    if KIND == 2 or KIND == 8:
        scale = _half(start, there)[:, None]
        j = tl.arange(0, 16 if KIND == 2 else 32)[None, :]
        code = tl.load(start[:, None] + 2 + j, mask=there[:, None], other=0)
        if KIND == 2:
            _write(to[:, None] + j, scale * ((code & 15).to(tl.int32) - 8).to(tl.float32), there[:, None])
            _write(to[:, None] + j + 16, scale * ((code >> 4).to(tl.int32) - 8).to(tl.float32), there[:, None])
        else:
            _write(to[:, None] + j, scale * code.to(tl.int8, bitcast=True).to(tl.float32), there[:, None])
    elif KIND == 14:
        inside = there[:, None, None, None]
        half, side, j = tl.arange(0, 2)[None, :, None, None], tl.arange(0, 2)[None, None, :, None], tl.arange(0, 16)
        at, j = start[:, None, None, None], side * 16 + j[None, None, None, :]
        scale = _half(start + 208, there)[:, None, None, None]
        high = tl.load(at + 128 + half * 32 + j, mask=inside, other=0)
        for turn in tl.static_range(2):
            low = tl.load(at + half * 64 + turn * 32 + j, mask=inside, other=0)
            for nibble in tl.static_range(2):
                quarter: tl.constexpr = turn + 2 * nibble
                own = tl.load(at + 192 + half * 8 + quarter * 2 + side, mask=inside, other=0).to(tl.int8, bitcast=True)
                code = ((low >> (4 * nibble)) & 15) | (((high >> (2 * quarter)) & 3) << 4)
                value = (scale * own.to(tl.float32)) * (code.to(tl.int32) - 32).to(tl.float32)
                _write(to[:, None, None, None] + half * 128 + quarter * 32 + j, value, inside)
    else:
        inside = there[:, None, None]
        at, part, j = start[:, None, None], tl.arange(0, 4)[None, :, None], tl.arange(0, 32)[None, None, :]
        scale, least = _half(start, there)[:, None, None], _half(start + 2, there)[:, None, None]
        code = tl.load(at + (48 if KIND == 13 else 16) + part * 32 + j, mask=inside, other=0)
        if KIND == 13:
            fifth = tl.load(at + 16 + j, mask=inside, other=0)
        for nibble in tl.static_range(2):
            own, minimum = _k_scale(at, part * 2 + nibble, inside)
            value = (code >> (4 * nibble)) & 15
            if KIND == 13:
                value = value | (((fifth >> (part * 2 + nibble).to(tl.uint8)) & 1) << 4)
            value = (scale * own) * value.to(tl.float32) - least * minimum
            _write(to[:, None, None] + part * 64 + nibble * 32 + j, value, inside)


@triton.jit  # type: ignore[untyped-decorator]
def _fp8(  # type: ignore[no-untyped-def]
    whole, codes, scales, rows, columns, own_rows, height, width, down, across, stack_stride, row_stride,
    SPAN: tl.constexpr, SPANS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """SPAN columns side by side share a scale."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = (tl.program_id(1) * SPANS + tl.arange(0, SPANS)) * SPAN
    stack, own = row // own_rows, row % own_rows
    known = (row < rows)[:, None] & (first < columns)[None, :]
    at = (stack * down + own // height)[:, None] * across + (first // width)[None, :]
    scale = tl.load(scales + at, mask=known, other=0)[:, :, None]
    column, inside = first[None, :, None] + tl.arange(0, SPAN)[None, None, :], known[:, :, None]
    code = tl.load(codes + row[:, None, None] * columns + column, mask=inside, other=0).to(tl.int32)
    size = ((code & 127) << 7).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256
    size = tl.where((code & 127) == 127, float("nan"), size)
    to = whole + (stack * stack_stride + own * row_stride)[:, None, None] + column
    _write(to, tl.where(code > 127, -size, size) * scale, inside)


GGML_KINDS = (2, 8, 12, 13, 14)
"""ggml's types that have a kernel here."""


def expand_ggml(stacked: torch.Tensor, packed: torch.Tensor, kind: int, weights: int, nbytes: int) -> None:
    """Blocks of ggml's type `kind`, contiguous, into `stacked` (stack, rows, columns), whose columns are adjacent."""
    _, rows, columns = stacked.shape
    across, blocks = columns // weights, stacked.numel() // weights
    each = _WEIGHTS_A_PROGRAM // weights
    _ggml[(triton.cdiv(blocks, each),)](
        stacked, packed, blocks, across, rows, stacked.stride(0), stacked.stride(1),
        KIND=kind, WEIGHTS=weights, NBYTES=nbytes, BLOCKS=each, num_warps=4,
    )  # fmt: skip


def expand_fp8(stacked: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, height: int, width: int) -> bool:
    """FP8 codes (uint8) with a scale for `height` x `width`; False where no kernel here does it."""
    stack, rows, columns = stacked.shape
    span = next((span for span in (128, 64, 32, 16) if width % span == 0 and columns % span == 0), None)
    if span is None:
        return False
    wide, high = 512 // span, 4
    _fp8[(triton.cdiv(stack * rows, high), triton.cdiv(columns, 512))](
        stacked, codes, scales, stack * rows, columns, rows, height, width, scales.shape[-2], scales.shape[-1],
        stacked.stride(0), stacked.stride(1), SPAN=span, SPANS=wide, ROWS=high, num_warps=4,
    )  # fmt: skip
    return True
