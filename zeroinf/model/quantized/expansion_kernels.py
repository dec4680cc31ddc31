"""Launches the GPU's kernels that expand packed weights: a function for each operator of `fused`, of the same name.

Given tensors on the meta device, a function compiles its kernel for such tensors on the current GPU, and nothing runs.
Only a process that needs the kernels imports this: Triton comes with torch for CUDA alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton

from zeroinf.compat.launches import Launch
from zeroinf.model.quantized.code_kernels import (
    expand_affine,
    expand_e2m1,
    expand_e4m3,
    expand_table,
    expand_tinygemm,
    expand_views,
)
from zeroinf.model.quantized.ggml_kernels import expand_blocks

_UNIT = 8
# Units of ggml's types whose codes share bytes, which one thread computes.
_FOLDS = dict.fromkeys((2, 3, 6, 7, 8, 12, 13, 20, 23, 39, 40), 2) | dict.fromkeys((10, 11, 14, 35), 4)


class Tile(NamedTuple):
    """What one program computes, by so many warps: rows, and units of them."""

    rows: int
    units: int
    warps: int


TILES = {
    "in a row": Tile(1, 256, 2),
    "blocks in a row": Tile(1, 256, 4),
    "blocks in a row, one a thread": Tile(1, 128, 4),
    "points in a row": Tile(1, 128, 1),
    "points in a row, of two loads": Tile(1, 256, 2),
    "rows": Tile(4, 64, 4),
    "rows in groups of an order": Tile(1, 128, 4),
    "rows in groups of an order, with scales side by side": Tile(64, 8, 4),
    "rows side by side": Tile(64, 16, 8),
    "lines": Tile(1, 128, 4),
}
"""By how weights lie in memory: all in a row, row after row, with those of a column side by side, or seen as lines; and
by what makes programs of another size the faster ones (scripts/bench-expansion, on an H200)."""
# Q8_0, Q2_K and Q6_K, of which a thread reads most bytes.
_ONE_A_THREAD = (8, 10, 14)
# IQ1_S, IQ2_S and IQ1_M, of which a thread's loads wait for others.
_OF_TWO_LOADS = (19, 22, 29)
# A scale of more than any row or matrix has is that of all of it.
_ALL = 1 << 30
# Side by side on the second axis of a grid.
_MOST_PROGRAMS = 65535
# Weights whose numbers, and those of their bytes, fit 32 bits.
_MOST_IN_A_ROW = 1 << 30


def expand_ggml(
    whole: torch.Tensor, packed: torch.Tensor, kind: int, weights: int, nbytes: int, table: torch.Tensor | None
) -> None:
    """Blocks of ggml's type `kind`."""
    given, fold = (_ready(packed), packed if table is None else table), _FOLDS.get(kind, 1)
    kinds: dict[str, Any] = {"KIND": kind, "WEIGHTS": weights, "NBYTES": nbytes, "FOLD": fold}
    flat = "blocks in a row" if fold > 1 else "points in a row"
    if kind in _ONE_A_THREAD:
        flat = "blocks in a row, one a thread"
    elif kind in _OF_TWO_LOADS:
        flat = "points in a row, of two loads"
    _launch(expand_blocks, whole, given, (), fold=fold, flat=flat, **kinds)


def expand_fp4(
    whole: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, of_all: torch.Tensor | None, divides: bool
) -> None:
    """Codes of four bits, the lower bits first, and a power of two or a scale in FP8 for some of them."""
    codes, shared = _ready(packed).view(-1).view(torch.int32), _ready(scales).view(torch.uint8)
    group = whole.numel() // scales.numel() // _UNIT
    given = codes, shared, shared if of_all is None else _ready(of_all)
    way = 0 if of_all is None else 2 if divides else 1
    _launch(expand_e2m1, whole, given, (), flat="in a row", GROUP=group, OF_ALL=way)


def expand_fp8(whole: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, height: int, width: int) -> None:
    """Weights in FP8; `scales` (..., blocks down, blocks across) are numbers or powers of two, blocks `height` x
    `width`."""
    down, across = scales.shape[-2:]
    are_powers = scales.dtype == torch.float8_e8m0fnu
    given = _ready(codes).view(torch.int32), _ready(scales.view(torch.uint8) if are_powers else scales)
    blocks = _ALL if down == 1 else height, _ALL if across == 1 else width // _UNIT
    _launch(expand_e4m3, whole, given, (down, across), HEIGHT=blocks[0], WIDTH=blocks[1], POWERS=are_powers)


def expand_integers(
    whole: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None,
    order: torch.Tensor | None, factor: float,
) -> None:  # fmt: skip
    """Codes side by side: bytes with signs, pairs of codes with signs, or words; scales of rows or all, in groups. All
    but codes may be in any order in memory."""
    bits = codes.shape[-1] * codes.itemsize * 8 // whole.shape[-1]
    groups, in_words = scales.shape[-1], codes.dtype == torch.int32
    kinds = {None: 0, torch.int8: 1, torch.int32: 2}
    kind = kinds.get(None if zeros is None else zeros.dtype, 3)
    own = _ready(codes).view(torch.int32)
    strides = (
        *_strides(own), *((0, 0, 0) if zeros is None else _strides(zeros)), *_strides(scales),
        0 if order is None or order.dim() == 1 else order.stride(0),
    )  # fmt: skip
    _launch(
        expand_affine, whole,
        (own, scales if zeros is None else zeros, scales, scales if order is None else order.contiguous()), strides,
        BITS=bits, GROUP=_ALL if groups == 1 else whole.shape[-1] // groups // _UNIT,
        IS_SIGNED=not in_words, ZEROS=kind, ZERO=0 if kind == 2 else 1 << (bits - 1), FACTOR=factor,
        IS_ORDERED=order is not None, are_rows_across=scales.stride(-2) == 1,
    )  # fmt: skip


def _strides(tensor: torch.Tensor) -> tuple[int, int, int]:
    """Of a matrix in the stack, if there is one; of a row, if there are several; and of a column."""
    return (
        tensor.stride(0) if tensor.dim() > 2 else 0,
        tensor.stride(-2) if tensor.shape[-2] > 1 else 0,
        tensor.stride(-1),
    )


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
        expand_table, whole, (own, values, scales, *more), counts, flat="in a row",
        BLOCK=block, NESTED=0 if nested is None else nested_block,
    )  # fmt: skip


def expand_lines(
    whole: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int, each: int
) -> None:
    """HQQ's codes of lines, `each` in a byte or word, and scales and zero points of lines or of columns of lines."""
    packed, wide = codes.shape[-2], codes.shape[-1] // _UNIT
    stacked, tile = whole if whole.dim() > 2 else whole[None], TILES["lines"]
    (stack, rows, columns), strides = stacked.shape, stacked.stride()
    is_flat = strides[2] == 1 and strides[1] == columns
    _run(
        expand_views, (triton.cdiv(packed * wide, tile.units), 1, stack),
        (whole, _ready(codes), scales.contiguous(), zeros.contiguous()),
        (
            rows * columns // _UNIT // wide, packed, rows * columns // _UNIT if is_flat else columns // _UNIT,
            _strides(codes)[0], _strides(scales)[0], *strides,
        ),
        BITS=bits, FOLD=each, WIDE=wide, IS_DOWN=scales.shape[-1] == 1, IS_FLAT=is_flat, UNITS=tile.units,
        num_warps=tile.warps, enable_fp_fusion=False,
    )  # fmt: skip


def expand_tiles(whole: torch.Tensor, codes: torch.Tensor, pairs: torch.Tensor) -> None:
    """torchao's codes in tiles (rows, columns, 32, words), and pairs (groups, rows, 2) of a scale and what is added."""
    tiles_across, inner = codes.shape[-3], codes.shape[-1] * 2
    columns = tiles_across * inner * 16
    stacks = codes.stride(0) if codes.dim() > 4 else 0, tiles_across, pairs.stride(0) if pairs.dim() > 3 else 0
    _launch(
        expand_tinygemm, whole, (_ready(codes), pairs.contiguous()), (*stacks, pairs.shape[-2] * 2),
        fold=4, GROUP=columns // pairs.shape[-3] // _UNIT, INNER=inner, FOLD=4,
    )  # fmt: skip


def _launch(
    kernel: Any, whole: torch.Tensor, before: tuple[torch.Tensor, ...], after: tuple[int, ...], *,
    fold: int = 1, flat: str = "", are_rows_across: bool = False, **kinds: Any,
) -> None:  # fmt: skip
    """Run `kernel` on all tiles of `whole`: its arguments are `before`, sizes, `after` and strides.

    A thread has `fold` units. Where nothing tells rows apart but their order, they are one if they lie so, with the
    tile `flat`.
    Products and sums are rounded apart, as torch's are.
    """
    stacked = whole if whole.dim() > 2 else whole[None]
    (stack, rows, columns), strides = stacked.shape, stacked.stride()
    is_turned = strides[2] != 1
    if flat and not is_turned and strides[1] == columns and rows * columns < _MOST_IN_A_ROW:
        rows, columns = 1, rows * columns
    units = columns // _UNIT // fold
    is_ordered = bool(kinds.get("IS_ORDERED"))
    if is_turned:
        tile = TILES["rows side by side"]
    elif rows == 1 and flat:
        tile = TILES[flat]
    else:
        way = "rows in groups of an order" if is_ordered else "rows"
        tile = TILES[way + ", with scales side by side" if is_ordered and are_rows_across else way]
        fits = (wide for wide in (tile.units, 64, 32, 16, 8) if triton.cdiv(units, wide) * wide <= 1.1 * units)
        wide = next(fits, 8)
        tile = Tile(tile.rows * tile.units // wide, wide, tile.warps)
    while not is_turned and triton.cdiv(rows, tile.rows) > _MOST_PROGRAMS:
        tile = Tile(2 * tile.rows, max(1, tile.units // 2), tile.warps)
    down, across = triton.cdiv(rows, tile.rows), triton.cdiv(units, tile.units)
    _run(
        kernel, (down, across, stack) if is_turned else (across, down, stack),
        (whole, *before), (rows, units, *after, *strides), **kinds, ROWS=tile.rows, UNITS=tile.units, TURNED=is_turned,
        num_warps=tile.warps, enable_fp_fusion=False,
    )  # fmt: skip


_launches: dict[Any, Launch] = {}
"""By kernels."""


def _run(
    kernel: Any, grid: tuple[int, int, int], tensors: Sequence[torch.Tensor], numbers: Sequence[int], **options: Any
) -> None:
    launch = _launches.get(kernel)
    if launch is None:
        launch = _launches[kernel] = Launch(kernel)
    (launch.compile if tensors[0].is_meta else launch)(grid, tensors, numbers, **options)


def _ready(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, contiguous and at an address that 16 divides, as kernels read it."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
