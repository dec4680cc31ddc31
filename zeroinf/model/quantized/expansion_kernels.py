"""The GPU's kernels that expand packed weights. Only a process that needs them imports this: Triton comes with torch
for CUDA alone.

Each fills a tile of a matrix, of which rows and columns may lie anywhere, so that a transposed one takes no second
kernel. What is computed is that of the forms in torch, to the last bit: products are exact, and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from zeroinf.model.quantized import block_kernels

# A tile's rows and columns, where columns lie side by side in what is written, and where rows do.
_TILES = {True: (16, 128), False: (64, 32)}


# Triton looks annotations up while it compiles, and knows none of Python's types.
@triton.jit
def _byte(at, inside):  # type: ignore[no-untyped-def]
    return tl.load(at, mask=inside, other=0).to(tl.int32)


@triton.jit
def _half(at, inside):  # type: ignore[no-untyped-def]
    bits = _byte(at, inside) | (_byte(at + 1, inside) << 8)
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _fp4(code):  # type: ignore[no-untyped-def]
    """Twice the value of a code of four bits."""
    size = code & 7
    value = tl.where(size < 2, size, (2 + (size & 1)) << tl.maximum((size >> 1) - 1, 0)).to(tl.float32)
    return tl.where(code >= 8, -value, value)


@triton.jit
def _half_power(code):  # type: ignore[no-untyped-def]
    """Half of the power of two that a byte stands for."""
    bits = tl.where(code < 2, 0x00200000 << tl.minimum(code, 1), (code - 1) << 23)
    return bits.to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def _k_quant(at, j, inside, five: tl.constexpr):  # type: ignore[no-untyped-def]
    """Q4_K and Q5_K: weight `j` of a block at `at`."""
    group = j // 32
    other = group % 4
    one, two = _byte(at + 4 + other, inside), _byte(at + 8 + other, inside)
    both = _byte(at + 12 + other, inside)
    scale = tl.where(group < 4, one & 63, (both & 15) | ((one >> 2) & 48)).to(tl.float32)
    least = tl.where(group < 4, two & 63, (both >> 4) | ((two >> 2) & 48)).to(tl.float32)
    start = 48 if five else 16
    code = (_byte(at + start + (j // 64) * 32 + j % 32, inside) >> (4 * (group % 2))) & 15
    if five:
        code = code | (((_byte(at + 16 + j % 32, inside) >> group) & 1) << 4)
    return _half(at, inside) * scale * code.to(tl.float32) - _half(at + 2, inside) * least


@triton.jit  # type: ignore[untyped-decorator]
def _ggml_weight(at, j, inside, kind: tl.constexpr):  # type: ignore[no-untyped-def]
    """Weight `j` of a block of ggml's type `kind` at `at`."""
    if kind == 2:
        code = (_byte(at + 2 + j % 16, inside) >> (4 * (j // 16))) & 15
        value = _half(at, inside) * (code - 8).to(tl.float32)
    elif kind == 3:
        code = (_byte(at + 4 + j % 16, inside) >> (4 * (j // 16))) & 15
        value = _half(at, inside) * code.to(tl.float32) + _half(at + 2, inside)
    elif kind == 8:
        code = _byte(at + 2 + j, inside)
        value = _half(at, inside) * tl.where(code > 127, code - 256, code).to(tl.float32)
    elif kind == 12:
        value = _k_quant(at, j, inside, False)
    elif kind == 13:
        value = _k_quant(at, j, inside, True)
    elif kind == 14:
        own = j % 128
        low = (_byte(at + (j // 128) * 64 + own % 64, inside) >> (4 * (own // 64))) & 15
        high = (_byte(at + 128 + (j // 128) * 32 + own % 32, inside) >> (2 * (own // 32))) & 3
        scale = _byte(at + 192 + j // 16, inside)
        scale = tl.where(scale > 127, scale - 256, scale).to(tl.float32)
        value = _half(at + 208, inside) * scale * ((low | (high << 4)) - 32).to(tl.float32)
    else:
        code = (_byte(at + 1 + j % 16, inside) >> (4 * (j // 16))) & 15
        value = _half_power(_byte(at, inside)) * _fp4(code)
    return value


@triton.jit  # type: ignore[untyped-decorator]
def _tile(rows, columns, row_count: tl.constexpr, column_count: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows (64 bits) and columns of this program's tile, and which of them there are."""
    row = (tl.program_id(0).to(tl.int64) * row_count + tl.arange(0, row_count))[:, None]
    column = (tl.program_id(1) * column_count + tl.arange(0, column_count))[None, :]
    return row, column, (row < rows) & (column < columns)


@triton.jit
def _store(whole, value, row, column, own_rows, stack_stride, row_stride, column_stride, inside):  # type: ignore[no-untyped-def]
    at = (row // own_rows) * stack_stride + (row % own_rows) * row_stride + column.to(tl.int64) * column_stride
    tl.store(whole + at, value.to(whole.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _ggml(  # type: ignore[no-untyped-def]
    whole, packed, rows, columns, own_rows, stack_stride, row_stride, column_stride,
    kind: tl.constexpr, weights: tl.constexpr, nbytes: tl.constexpr,
    row_count: tl.constexpr, column_count: tl.constexpr,
):  # fmt: skip
    row, column, inside = _tile(rows, columns, row_count, column_count)
    at = packed + row * (columns // weights * nbytes) + (column // weights) * nbytes
    value = _ggml_weight(at, column % weights, inside, kind)
    _store(whole, value, row, column, own_rows, stack_stride, row_stride, column_stride, inside)


@triton.jit  # type: ignore[untyped-decorator]
def _fp4_pairs(  # type: ignore[no-untyped-def]
    whole, packed, scales, rows, columns, own_rows, stack_stride, row_stride, column_stride,
    row_count: tl.constexpr, column_count: tl.constexpr,
):  # fmt: skip
    row, column, inside = _tile(rows, columns, row_count, column_count)
    code = (_byte(packed + row * (columns // 2) + column // 2, inside) >> (4 * (column % 2))) & 15
    value = _half_power(_byte(scales + row * (columns // 32) + column // 32, inside)) * _fp4(code)
    _store(whole, value, row, column, own_rows, stack_stride, row_stride, column_stride, inside)


@triton.jit  # type: ignore[untyped-decorator]
def _words(  # type: ignore[no-untyped-def]
    whole, words, zeros, scales, order, rows, columns, own_rows, groups, group, stack_stride, row_stride, column_stride,
    bits: tl.constexpr, less: tl.constexpr, is_awq: tl.constexpr, is_ordered: tl.constexpr,
    row_count: tl.constexpr, column_count: tl.constexpr,
):  # fmt: skip
    """GPTQ's and AWQ's layouts; rows are outputs, columns are inputs."""
    each: tl.constexpr = 32 // bits
    mask: tl.constexpr = (1 << bits) - 1
    row, column, inside = _tile(rows, columns, row_count, column_count)
    stack, own = row // own_rows, row % own_rows
    across = own_rows // each
    if is_awq:
        place = (own % 8) // 2 + (own % 2) * 4  # column 1 of eight lies in place 4
        code = tl.load(words + (stack * columns + column) * across + own // 8, mask=inside, other=0) >> (4 * place)
    else:
        place = own % each
        deep = columns // each
        code = tl.load(words + (stack * deep + column // each) * own_rows + own, mask=inside, other=0)
        code = code >> (bits * (column % each))
    if is_ordered:
        part = tl.load(order + stack * columns + column, mask=inside, other=0).to(tl.int64)
    else:
        part = (column // group).to(tl.int64)
    zero = tl.load(zeros + (stack * groups + part) * across + own // each, mask=inside, other=0) >> (bits * place)
    zero = ((zero & mask) + less) & mask
    scale = tl.load(scales + (stack * groups + part) * own_rows + own, mask=inside, other=0).to(tl.float32)
    value = ((code & mask) - zero).to(tl.float32) * scale
    _store(whole, value, row, column, own_rows, stack_stride, row_stride, column_stride, inside)


@triton.jit  # type: ignore[untyped-decorator]
def _fp8(  # type: ignore[no-untyped-def]
    whole, codes, scales, rows, columns, own_rows, height, width, down, across, stack_stride, row_stride, column_stride,
    row_count: tl.constexpr, column_count: tl.constexpr,
):  # fmt: skip
    row, column, inside = _tile(rows, columns, row_count, column_count)
    stack, own = row // own_rows, row % own_rows
    code = _byte(codes + row * columns + column, inside)
    size = ((code & 127) << 7).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256
    size = tl.where((code & 127) == 127, float("nan"), size)
    scale = tl.load(scales + (stack * down + own // height) * across + column // width, mask=inside, other=0)
    value = tl.where(code > 127, -size, size) * scale
    _store(whole, value, row, column, own_rows, stack_stride, row_stride, column_stride, inside)


def _launch(
    kernel: Any, whole: torch.Tensor, before: tuple[object, ...], after: tuple[object, ...], **kinds: object
) -> None:
    """Run `kernel` on all tiles of `whole`: its arguments are `before`, sizes, `after` and strides."""
    stacked = whole if whole.dim() > 2 else whole[None]
    stack, own_rows, columns = stacked.shape
    rows = stack * own_rows
    row_count, column_count = _TILES[stacked.stride(2) == 1]
    grid = triton.cdiv(rows, row_count), triton.cdiv(columns, column_count)
    kernel[grid](
        whole, *before, rows, columns, own_rows, *after, *stacked.stride(), **kinds,
        row_count=row_count, column_count=column_count,
    )  # fmt: skip


def _agree(
    fast: Callable[[torch.Tensor], object], sure: Callable[[torch.Tensor], object], shape: tuple[int, ...]
) -> bool:
    """Whether two ways of filling a tensor of `shape` run on this GPU and give the same bits."""
    found, right = (torch.empty(shape, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    sure(right)
    try:
        fast(found)
    except Exception:  # Triton has errors of many kinds, and none of them may end a run
        return False
    return torch.equal(found.nan_to_num(), right.nan_to_num())


@cache
def _blocks_agree(kind: int, weights: int, nbytes: int) -> bool:
    packed = torch.randint(0, 256, (3, 5, 2 * nbytes), dtype=torch.uint8, device="cuda")
    return _agree(
        lambda whole: block_kernels.expand_ggml(whole, packed, kind, weights, nbytes),
        lambda whole: _launch(_ggml, whole, (packed,), (), kind=kind, weights=weights, nbytes=nbytes),
        (3, 5, 2 * weights),
    )


@cache
def _fp8_agrees() -> bool:
    codes = torch.arange(256, dtype=torch.uint8, device="cuda").repeat(3, 5, 2)
    scales = torch.rand(3, 2, 4, device="cuda")
    return _agree(
        lambda whole: block_kernels.expand_fp8(whole, codes, scales, 3, 128),
        lambda whole: _launch(_fp8, whole, (codes, scales), (3, 128, 2, 4)),
        (3, 5, 512),
    )


def expand_ggml(whole: torch.Tensor, packed: torch.Tensor, kind: int, weights: int, nbytes: int) -> None:
    """Blocks of ggml's type `kind`."""
    stacked = whole if whole.dim() > 2 else whole[None]
    if kind in block_kernels.GGML_KINDS and stacked.stride(2) == 1 and _blocks_agree(kind, weights, nbytes):
        block_kernels.expand_ggml(stacked, packed.contiguous(), kind, weights, nbytes)
        return
    _launch(_ggml, whole, (packed.contiguous(),), (), kind=kind, weights=weights, nbytes=nbytes)


def expand_fp4(whole: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor) -> None:
    """Codes of gpt-oss: two a byte, and a power of two for 32."""
    _launch(_fp4_pairs, whole, (packed.contiguous(), scales.contiguous()), ())


def expand_words(
    whole: torch.Tensor, codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, order: torch.Tensor | None,
    bits: int, less: int, awq: bool,
) -> None:  # fmt: skip
    """Codes of GPTQ, or of AWQ; `order` tells the group of each input where it is not in order."""
    groups = scales.shape[-2]
    order_or_none = scales if order is None else order.contiguous()
    before = codes.contiguous(), zeros.contiguous(), scales.contiguous(), order_or_none
    _launch(
        _words, whole, before, (groups, whole.shape[-1] // groups),
        bits=bits, less=less, is_awq=awq, is_ordered=order is not None,
    )  # fmt: skip


def expand_fp8(whole: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, height: int, width: int) -> None:
    """Weights in FP8; `scales` (..., blocks down, blocks across) are float32, blocks `height` x `width`."""
    sizes = height, width, scales.shape[-2], scales.shape[-1]
    packed = codes.view(torch.uint8).contiguous()
    stacked = whole if whole.dim() > 2 else whole[None]
    if (
        stacked.stride(2) == 1
        and _fp8_agrees()
        and block_kernels.expand_fp8(stacked, packed, scales.contiguous(), height, width)
    ):
        return
    _launch(_fp8, whole, (packed, scales.contiguous()), sizes)
