"""Launches the GPU's kernels that expand packed weights: a function for each operator of `fused`, of the same name.

Only a process that needs the kernels imports this: Triton comes with torch for CUDA alone.
"""

from __future__ import annotations

from typing import Any

import torch
import triton

from zeroinf.model.quantized.code_kernels import expand_affine, expand_awq, expand_e2m1, expand_e4m3, expand_table
from zeroinf.model.quantized.ggml_kernels import expand_blocks

_UNIT = 8
# A program has so many units, of one row or of several; those of two layouts, where rows lie side by side.
_UNITS_OF_PROGRAM = 512
_ROWS_SIDE_BY_SIDE = {"whole": (64, 8), "codes": (32, 16)}
# A scale of more than any row or matrix has is that of all of it.
_ALL = 1 << 30


def expand_ggml(
    whole: torch.Tensor, packed: torch.Tensor, kind: int, weights: int, nbytes: int, table: torch.Tensor | None
) -> None:
    """Blocks of ggml's type `kind`."""
    given = _ready(packed), packed if table is None else table
    _launch(expand_blocks, whole, given, (), KIND=kind, WEIGHTS=weights, NBYTES=nbytes)


def expand_fp4(
    whole: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, of_all: torch.Tensor | None, divides: bool
) -> None:
    """Codes of four bits, the lower bits first, and a power of two or a scale in FP8 for some of them."""
    codes, shared = _ready(packed).view(-1).view(torch.int32), _ready(scales).view(torch.uint8)
    group = whole.numel() // scales.numel() // _UNIT
    given = codes, shared, shared if of_all is None else _ready(of_all)
    _launch(expand_e2m1, whole, given, (), GROUP=group, OF_ALL=0 if of_all is None else 2 if divides else 1)


def expand_fp8(whole: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, height: int, width: int) -> None:
    """Weights in FP8; `scales` (..., blocks down, blocks across) are float32, blocks `height` x `width`."""
    down, across = scales.shape[-2:]
    given = _ready(codes).view(torch.int32), _ready(scales)
    blocks = _ALL if down == 1 else height, _ALL if across == 1 else width // _UNIT
    _launch(expand_e4m3, whole, given, (down, across), HEIGHT=blocks[0], WIDTH=blocks[1])


def expand_words(
    whole: torch.Tensor, codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, order: torch.Tensor | None,
    bits: int, less: int, awq: bool,
) -> None:  # fmt: skip
    """Codes of GPTQ, or of AWQ; `order` tells the group of each input where it is not in order."""
    groups, rows = scales.shape[-2:]
    group = whole.shape[-1] // groups // _UNIT
    if not awq:
        codes, zeros, scales = _ready(codes), _ready(zeros), _ready(scales)
        _affine(
            whole, codes, (1, rows), zeros, (1, zeros.shape[-1]), scales, (1, rows), order,
            BITS=bits, GROUP=_ALL if groups == 1 else group, IS_SIGNED=False, ZEROS=2, ZERO=less, FACTOR=1.0,
        )  # fmt: skip
        return
    stacked = whole if whole.dim() > 2 else whole[None]
    words, units = rows // 8, stacked.shape[2] // _UNIT
    expand_awq[triton.cdiv(words, 16), triton.cdiv(units, 8), stacked.shape[0]](
        whole, _ready(codes), _ready(zeros), _ready(scales), words, units, groups, *stacked.stride(),
        GROUP=_ALL if groups == 1 else group, ROWS=16, UNITS=8, num_warps=4,
    )  # fmt: skip


def expand_integers(
    whole: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None,
    order: torch.Tensor | None, factor: float,
) -> None:  # fmt: skip
    """Codes side by side, as bytes with signs or in words; a scale for each row or for all, and for groups."""
    bits = 8 if codes.dtype == torch.int8 else codes.shape[-1] * 32 // whole.shape[-1]
    own, scales = _ready(codes).view(torch.int32), _ready(scales)
    down, groups = scales.shape[-2:]
    scale_strides = 0 if down == 1 else groups, 1
    zeros, half = None if zeros is None else _ready(zeros), 1 << (bits - 1)
    if zeros is None:
        kind, zero_strides = 0, (0, 0)
    else:
        kind, zero_strides = (2, (groups, 1)) if zeros.dtype == torch.int32 else (1, scale_strides)
    _affine(
        whole, own, (own.shape[-1], 1), zeros, zero_strides, scales, scale_strides, order,
        BITS=bits, GROUP=_ALL if groups == 1 else whole.shape[-1] // groups // _UNIT,
        IS_SIGNED=codes.dtype == torch.int8, ZEROS=kind, ZERO=0 if kind == 2 else half, FACTOR=factor,
    )  # fmt: skip


def _affine(
    whole: torch.Tensor, codes: torch.Tensor, code_strides: tuple[int, int], zeros: torch.Tensor | None,
    zero_strides: tuple[int, int], scales: torch.Tensor, scale_strides: tuple[int, int], order: torch.Tensor | None,
    **kinds: object,
) -> None:  # fmt: skip
    """Strides are those of a row, and of a word of codes or of a group."""
    if order is not None:
        order = _ready(order)
    strides = (
        _matrix_size(codes), *code_strides, 0 if zeros is None else _matrix_size(zeros), *zero_strides,
        _matrix_size(scales), *scale_strides, 0 if order is None or order.dim() == 1 else order.shape[-1],
    )  # fmt: skip
    given = codes, scales if zeros is None else zeros, scales, scales if order is None else order
    kinds["IS_ORDERED"] = order is not None
    _launch(expand_affine, whole, given, strides, are_codes_across=code_strides[0] == 1, **kinds)


def expand_four_bits(
    whole: torch.Tensor, codes: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, nested: torch.Tensor | None,
    nested_values: torch.Tensor | None, offset: torch.Tensor | None, nested_block: int,
) -> None:  # fmt: skip
    """Codes of bitsandbytes, and scales of their blocks; if `nested`, those are codes too, with scales of blocks."""
    own, values, scales = _ready(codes).view(-1).view(torch.int32), _ready(values), _ready(scales)
    more = [scales if one is None else _ready(one) for one in (nested, nested_values, offset)]
    block = whole.shape[-2] * whole.shape[-1] // scales.shape[-1] // _UNIT
    counts = scales.shape[-1], more[0].shape[-1]
    _launch(
        expand_table, whole, (own, values, scales, *more), counts,
        BLOCK=block, NESTED=0 if nested is None else nested_block,
    )  # fmt: skip


def _launch(
    kernel: Any, whole: torch.Tensor, before: tuple[torch.Tensor, ...], after: tuple[int, ...], *,
    are_codes_across: bool = False, **kinds: object,
) -> None:  # fmt: skip
    """Run `kernel` on all tiles of `whole`: its arguments are `before`, sizes, `after` and strides.

    Products and sums are rounded apart, as torch's are.
    """
    stacked = whole if whole.dim() > 2 else whole[None]
    stack, rows, columns = stacked.shape
    units, is_turned = columns // _UNIT, stacked.stride(2) != 1
    if is_turned or are_codes_across:
        own_rows, own_units = _ROWS_SIDE_BY_SIDE["whole" if is_turned else "codes"]
    else:
        own_units = next(
            wide for wide in (64, 32, 16, 8) if wide == 8 or triton.cdiv(units, wide) * wide <= 1.1 * units
        )
        own_rows = _UNITS_OF_PROGRAM // own_units
    kernel[triton.cdiv(rows, own_rows), triton.cdiv(units, own_units), stack](
        whole, *before, rows, units, *after, *stacked.stride(), **kinds,
        ROWS=own_rows, UNITS=own_units, TURNED=is_turned, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def _matrix_size(tensor: torch.Tensor) -> int:
    """Elements of one matrix of a stack; 0 where there is no stack, so that no matrix is skipped."""
    return tensor[0].numel() if tensor.dim() > 2 else 0


def _ready(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, contiguous and at an address that 16 divides, as kernels read it."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
