"""The GPU's kernel that multiplies by weights as they rest: codes of 4 or 8 bits, or numbers, dense or by expert.

Only a process that needs it imports this: Triton comes with torch for CUDA alone. A program computes a tile of outputs
by rows of inputs, transposed: weights are the left side of the product, which tensor cores take from registers, where
codes have just become weights. Sums are in float32.
"""

# ruff: noqa: N803  constants of a kernel are written large

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from math import gcd

import torch
import triton
import triton.language as tl

from zeroinf.compat.launches import Launch
from zeroinf.engines.stream.coded_weight import WeightMatrix
from zeroinf.engines.stream.decode_in_registers import (
    INPUTS_IN_ORDER,
    eight_bits,
    four_bits,
    input_of,
    power_of_two,
)
from zeroinf.model.quantized.tile_kernels import e4m3


@triton.jit  # type: ignore[untyped-decorator]
def _tile_of(program, row_tiles, across, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The tiles of rows and of outputs that a program computes. Programs side by side take the tiles of rows that share
    weights, WIDE of them at most."""
    first = program // (WIDE * across) * WIDE
    wide = tl.minimum(row_tiles - first, WIDE)
    return first + program % (WIDE * across) % wide, program % (WIDE * across) // wide


@triton.jit  # type: ignore[untyped-decorator]
def _by_numbers(  # type: ignore[no-untyped-def]
    acc, x_at, weight_at, begin, finish, real, input_stride,
    EVEN: tl.constexpr, TURNED: tl.constexpr, INPUTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`acc` and the product of inputs from `begin` to `finish`, INPUTS at a time, by weights that are numbers."""
    for k in range(begin, finish, INPUTS):
        column = k + tl.arange(0, INPUTS)
        x_ptr, w_ptr = x_at + column[:, None], weight_at + column[None, :] * input_stride
        if EVEN and not TURNED:
            acc = tl.dot(tl.load(w_ptr), tl.load(x_ptr), acc, input_precision=PRECISION)
        else:
            there = column < finish
            w = tl.load(w_ptr, mask=(there[None, :] & real[:, None]) if TURNED else there[None, :], other=0)
            acc = tl.dot(w, tl.load(x_ptr, mask=there[:, None], other=0), acc, input_precision=PRECISION)
    return acc


@triton.jit  # type: ignore[untyped-decorator]
def _by_four_bits(  # type: ignore[no-untyped-def]
    acc, x_at, words, scales, zeros, weight_row, first_word, first_group, row_groups, begin, finish,
    GROUP: tl.constexpr, FLOAT: tl.constexpr, ZEROS: tl.constexpr, SHARED: tl.constexpr, SIDE: tl.constexpr,
    EVEN: tl.constexpr, AHEAD: tl.constexpr, INPUTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same by codes of four bits with scales, and zero points if `ZEROS`; `first_word` and `first_group` (outputs,)
    of the rows `weight_row`, which have so many groups. Inputs lie in the order of `input_of`, with zeros past the last
    one of 128.

    `AHEAD`: scales are loaded one step before their use, where they are too narrow to be copied ahead of it.
    """
    dtype: tl.constexpr = x_at.dtype.element_ty
    groups: tl.constexpr = INPUTS // 32
    scaled: tl.constexpr = INPUTS // GROUP
    scale_at, word_at = scales + first_group[:, None], words + first_word[:, None]
    # Eight rows share words of zero points.
    zero_at, shift = zeros + (weight_row // 8 * row_groups)[:, None], (weight_row % 8 * 4).to(tl.int32)[:, None]
    column = tl.arange(0, groups * 16) // 64 * 128 + tl.arange(0, groups * 16) % 64
    if AHEAD:
        next_scale = _load_groups(scale_at, begin // GROUP + tl.arange(0, scaled), finish // GROUP, False)
    for k in range(begin, finish, INPUTS):
        if AHEAD:
            scale = next_scale
            next_scale = _load_groups(scale_at, (k + INPUTS) // GROUP + tl.arange(0, scaled), finish // GROUP, False)
        else:
            scale = _load_groups(scale_at, k // GROUP + tl.arange(0, scaled), finish // GROUP, EVEN)
        if SHARED:
            scale = e4m3(scale.to(tl.int32) << 24).to(dtype)
        elif FLOAT:
            scale = power_of_two(scale, dtype)
        zero = scale
        if ZEROS:
            zero = _load_groups(zero_at, k // GROUP + tl.arange(0, scaled), finish // GROUP, EVEN)
            zero = (zero >> shift) & 15
        number = k // 8 + tl.arange(0, groups * 4)[None, :]
        if EVEN:
            word = tl.load(word_at + number)
        else:  # the same for the words of a group, so that these are loaded together
            word = tl.load(word_at + number, mask=number // 4 < finish // 32, other=0)
        word = tl.reshape(word, (word.shape[0], groups, 4))
        lower, upper = four_bits(word, _by_word(scale, GROUP), _by_word(zero, GROUP), FLOAT, ZEROS, SIDE, dtype)
        if INPUTS == 128:
            low, high = tl.load(x_at + (k + column)[:, None]), tl.load(x_at + (k + column + 64)[:, None])
        else:
            there = (k + column < tl.cdiv(finish, 128) * 128)[:, None]
            low = tl.load(x_at + (k + column)[:, None], mask=there, other=0)
            high = tl.load(x_at + (k + column + 64)[:, None], mask=there, other=0)
        acc = tl.dot(lower, low, acc, input_precision=PRECISION)
        acc = tl.dot(upper, high, acc, input_precision=PRECISION)
    return acc


@triton.jit  # type: ignore[untyped-decorator]
def _by_word(value, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """A value of each group (outputs, groups) for each 32 inputs, or their four words."""
    wide = value[:, :, None]
    if GROUP != 32:
        wide = tl.broadcast_to(wide, (value.shape[0], value.shape[1], GROUP // 8))
        wide = tl.reshape(wide, (value.shape[0], value.shape[1] * GROUP // 32, 4))
    return wide


@triton.jit  # type: ignore[untyped-decorator]
def _by_eight_bits(  # type: ignore[no-untyped-def]
    acc, x_at, words, scales, first_group, begin, finish,
    SIDE: tl.constexpr, EVEN: tl.constexpr, INPUTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same by codes of a byte, 64 inputs of each group."""
    groups: tl.constexpr = INPUTS // 64
    outputs: tl.constexpr = acc.shape[0]
    scale_at, word_at = scales + first_group[:, None], words + first_group[:, None] * 16
    for k in range(begin, finish, INPUTS):
        column, number = k + tl.arange(0, INPUTS), k // 4 + tl.arange(0, INPUTS // 4)[None, :]
        scale = _load_groups(scale_at, k // 64 + tl.arange(0, groups), finish // 64, EVEN)
        if EVEN:
            word = tl.load(word_at + number)
        else:
            word = tl.load(word_at + number, mask=number // 16 < finish // 64, other=0)
        of_chunk = tl.reshape(tl.broadcast_to(scale[:, :, None], (outputs, groups, 2)), (outputs, groups * 2))
        word = tl.reshape(word, (outputs, groups * 2, 8))
        weight = eight_bits(word, of_chunk[:, :, None], SIDE, x_at.dtype.element_ty)
        if INPUTS == 128:
            row = tl.load(x_at + column[:, None])
        else:
            row = tl.load(x_at + column[:, None], mask=(column < tl.cdiv(finish, 128) * 128)[:, None], other=0)
        acc = tl.dot(weight, row, acc, input_precision=PRECISION)
    return acc


@triton.jit  # type: ignore[untyped-decorator]
def _load_groups(at, number, end, EVEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """What lies at `number` (numbers,) from each of `at` (outputs, 1) on, of which those before `end` are there."""
    return tl.load(at + number[None, :]) if EVEN else tl.load(at + number[None, :], mask=number[None, :] < end, other=0)


@Launch
@triton.jit(do_not_specialize=["total"])  # type: ignore[untyped-decorator]
def _put_in_order(  # type: ignore[no-untyped-def]
    x, out, total, inputs, x_stride, wide,
    BITS: tl.constexpr, PAIRS: tl.constexpr, SIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    source = input_of((at % wide).to(tl.int32), BITS, PAIRS, SIDE)
    value = tl.load(x + at // wide * x_stride + source, mask=(at < total) & (source < inputs), other=0)
    tl.store(out + at, value, mask=at < total)


@Launch
@triton.jit(do_not_specialize=["rows", "first_expert", "experts"])  # type: ignore[untyped-decorator]
def _product(  # type: ignore[no-untyped-def]
    x, weight, scales, zeros, shared, bias, out, slots, tiles, rows, outputs, inputs, each, x_stride, output_stride,
    input_stride, out_stride, part_stride, first_expert, experts, matrices,
    BITS: tl.constexpr, GROUP: tl.constexpr, BY_EXPERT: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN: tl.constexpr,
    TURNED: tl.constexpr, FLOAT: tl.constexpr, ZEROS: tl.constexpr, SHARED: tl.constexpr, SIDE: tl.constexpr,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`tiles` (3, tiles): the expert of each tile of slots, its first slot in order, and where the expert's end. Those
    are computed that go to one of `experts` experts from `first_expert` on, of which `weight` has the weights.

    `FLOAT`: codes are E2M1, with powers of two as scales; or (`SHARED`) numbers in FP8 times (1), or divided by (2),
    what each of `matrices` shares that lie side by side along the outputs. `TURNED`: the outputs of numbers lie side by
    side. They are loaded by a mask then, since addresses that do not follow each other everywhere are read one by one.
    `ALIGNED`: 32 inputs, and groups, of a row are a multiple of it.
    """
    across = tl.cdiv(outputs, OUTPUTS)
    row_tiles = tl.num_programs(0) // across
    row_tile, output_tile = _tile_of(tl.program_id(0), row_tiles, across, WIDE)
    output = output_tile * OUTPUTS + tl.arange(0, OUTPUTS)
    own = tl.arange(0, ROWS)
    if BY_EXPERT:
        expert = tl.load(tiles + row_tile).to(tl.int64)
        if (expert < first_expert) | (expert >= first_expert + experts):
            return
        start = tl.load(tiles + row_tiles + row_tile)
        end = tl.load(tiles + 2 * row_tiles + row_tile)
        inside = start + own < end
        row = tl.load(slots + start + own, mask=inside, other=0).to(tl.int64)
        x_row = row // each
    else:
        expert = first_expert
        row = row_tile.to(tl.int64) * ROWS + own
        inside = row < rows
        x_row = tl.where(inside, row, 0)
    real = output < outputs
    own_expert = expert - first_expert
    weight_row = tl.where(real, output, 0).to(tl.int64) + own_expert * outputs
    x_at = x + x_row[None, :] * x_stride
    acc = tl.zeros((OUTPUTS, ROWS), tl.float32)
    steps = tl.cdiv(tl.cdiv(inputs, INPUTS), tl.num_programs(1))
    begin = tl.program_id(1) * steps * INPUTS
    finish = tl.minimum(begin + steps * INPUTS, inputs)
    tl.assume(begin < finish)  # a loop that may not run at all makes tensor cores wait for each of their steps
    if BITS == 16:
        of_expert = output.to(tl.int64) if TURNED else weight_row - own_expert * outputs
        weight_at = weight + own_expert * outputs * inputs + of_expert[:, None] * output_stride
        acc = _by_numbers(acc, x_at, weight_at, begin, finish, real, input_stride, EVEN, TURNED, INPUTS, PRECISION)
    else:
        first_group = tl.multiple_of(weight_row * (inputs // GROUP), [ALIGNED])
        if BITS == 4:
            # Bytes are too narrow to be copied ahead of their use.
            alike: tl.constexpr = ALIGNED if ALIGNED * GROUP < INPUTS else INPUTS // GROUP
            ahead: tl.constexpr = alike * (scales.dtype.element_ty.primitive_bitwidth // 8) < 4
            first_word = tl.multiple_of(weight_row * (inputs // 8), [ALIGNED * 4])
            acc = _by_four_bits(
                acc, x_at, weight, scales, zeros, weight_row, first_word, first_group, inputs // GROUP, begin, finish,
                GROUP, FLOAT, ZEROS, SHARED, SIDE, EVEN, ahead, INPUTS, PRECISION,
            )  # fmt: skip
        else:
            tl.static_assert(GROUP == 64)
            acc = _by_eight_bits(acc, x_at, weight, scales, first_group, begin, finish, SIDE, EVEN, INPUTS, PRECISION)
    if SHARED:
        of_matrix = tl.load(shared + own_expert * matrices + output // (outputs // matrices), mask=real, other=1)
        acc = acc * of_matrix[:, None] if SHARED == 1 else acc / of_matrix[:, None]
    if HAS_BIAS:
        acc += tl.load(bias + expert * outputs + output, mask=real, other=0).to(tl.float32)[:, None]
    at = out + tl.program_id(1).to(tl.int64) * part_stride + row[None, :] * out_stride + output[:, None]
    tl.store(at, acc.to(out.dtype.element_ty), mask=real[:, None] & inside[None, :])


@Launch
@triton.jit(do_not_specialize=["total", "count"])  # type: ignore[untyped-decorator]
def _sum_parts(  # type: ignore[no-untyped-def]
    parts, bias, out, total, outputs, count, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < total
    acc = tl.zeros((BLOCK,), tl.float32)
    for _part in range(count):
        acc += tl.load(parts + at, mask=inside, other=0)
        parts += total
    if HAS_BIAS:
        acc += tl.load(bias + at % outputs, mask=inside, other=0).to(tl.float32)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)


@dataclass(frozen=True, slots=True)
class SlotTable:
    """Which slots each expert computes, in tiles of `rows`."""

    slots: torch.Tensor
    """(slots,) in order of experts; those that no expert has are left out, and what is at the end has no meaning."""
    places: torch.Tensor
    """(slots,): where each slot is in that order."""
    ends: torch.Tensor
    """(experts,): where those of each expert end."""
    tiles: torch.Tensor
    rows: int


@dataclass(frozen=True, slots=True)
class ProductTile:
    """Sizes of a program's tile, and how it runs."""

    rows: int
    outputs: int
    inputs: int
    warps: int
    stages: int

    def shared_bytes(self, bits: int) -> int:
        """Shared memory that it takes, about: the weights, their scales and the inputs of each stage."""
        weights = self.outputs * self.inputs * bits // 8 + (self.outputs * self.inputs // 16 if bits < 16 else 0)
        return self.stages * (weights + self.rows * self.inputs * 2)


_TILES = (
    (12, ProductTile(16, 128, 128, 4, 4)),
    (28, ProductTile(32, 128, 128, 4, 4)),
    (96, ProductTile(64, 128, 128, 8, 3)),
    (1 << 62, ProductTile(128, 128, 64, 8, 3)),
)
"""By the most rows that they are for; few of them, since each is a kernel of its own to compile."""
_FOUR_BITS_TILES = (
    (12, ProductTile(16, 128, 128, 4, 4)),
    (28, ProductTile(32, 128, 128, 4, 3)),
    (72, ProductTile(64, 128, 128, 8, 4)),
    (1 << 62, ProductTile(128, 256, 128, 8, 3)),
)
"""The same by codes of four bits, where four warps multiply together."""
ROWS_TRIED = (12, 28, 64, 128)
"""Of each of these tiles, one."""


def tile_for(rows: int, bits: int, device: torch.device) -> ProductTile:
    """The tile for a product of `rows` rows (of one expert, on average) by weights of `bits` bits."""
    is_wide = bits == 4 and has_warp_groups(device)
    tile = next(tile for most, tile in (_FOUR_BITS_TILES if is_wide else _TILES) if rows <= most)
    least = INPUTS_IN_ORDER if bits < 16 else 64
    tile = replace(tile, inputs=max(tile.inputs, least))
    while tile.shared_bytes(bits) > _shared_memory(device) and (tile.stages > 2 or tile.inputs > least):
        tile = replace(tile, stages=tile.stages - 1) if tile.stages > 2 else replace(tile, inputs=tile.inputs // 2)
    return tile


def in_order(x: torch.Tensor, weight: WeightMatrix) -> torch.Tensor:
    """`x` (rows, inputs) as a product by `weight` reads it: as it is, or, by codes, with inputs in the order of
    `input_of`, and zeros up to a multiple of INPUTS_IN_ORDER."""
    if weight.bits == 16:
        return x if x.stride(1) == 1 else x.contiguous()
    rows, inputs = x.shape
    out = x.new_empty(rows, ordered_width(weight))
    if x.stride(1) != 1:
        x = x.contiguous()
    run = _put_in_order.compile if x.is_meta else _put_in_order
    total, block = out.numel(), 1024
    run(
        (-(-total // block),), (x, out), (total, inputs, x.stride(0), out.shape[1]),
        BITS=weight.bits, PAIRS=weight.of_checkpoint is not None, SIDE=side_by_side(weight, x.device), BLOCK=block,
    )  # fmt: skip
    return out


def side_by_side(weight: WeightMatrix, device: torch.device) -> int:
    """How many weights of a row a thread holds side by side where Triton multiplies by codes: two on GPUs
    with products of warp groups; elsewhere as many as fill 32 bits with halves of what is loaded."""
    return 2 if has_warp_groups(device) else 8 if weight.is_float else 4


@cache
def has_warp_groups(device: torch.device) -> bool:
    """Whether tensor cores multiply for four warps together, as Hopper's do."""
    index = device.index if device.type == "cuda" else None
    return torch.cuda.is_available() and torch.cuda.get_device_capability(index)[0] == 9


def ordered_width(weight: WeightMatrix) -> int:
    """Numbers in a row of `in_order`."""
    inputs = weight.shape[-1]
    return inputs if weight.bits == 16 else -(-inputs // INPUTS_IN_ORDER) * INPUTS_IN_ORDER


def launch_product(
    x: torch.Tensor, weight: WeightMatrix, bias: torch.Tensor | None, out: torch.Tensor, tile: ProductTile,
    row_tiles: int, routing: SlotTable | None, each: int, parts: int, first_expert: int = 0,
) -> None:  # fmt: skip
    """Multiply `x`, which is `in_order`, into `out` (rows or slots, outputs), or into its `parts` of sums over inputs
    (parts, rows, outputs). `weight` has the experts from `first_expert` on."""
    outputs, inputs = weight.shape[-2:]
    steps = _step(weight, tile)
    rows, slots, tiles = x.shape[0], x, x
    if routing is not None:
        slots, tiles = routing.slots, routing.tiles
    scales = x if weight.scales is None else weight.scales
    data = weight.data if weight.bits == 16 else weight.data.view(torch.int32)
    codes = weight.of_checkpoint
    zeros, shared = (None, None) if codes is None else (codes.zeros, codes.shared)
    if shared is not None:
        scales = scales.view(torch.uint8)
    part_stride = 0 if parts == 1 else rows * outputs
    run = _product.compile if x.is_meta else _product
    run(
        (row_tiles * -(-outputs // tile.outputs), parts),
        (
            x, data, scales, x if zeros is None else zeros, x if shared is None else shared,
            x if bias is None else bias, out, slots, tiles,
        ),
        (
            rows, outputs, inputs, each, x.stride(0), *_strides(weight), outputs, part_stride, first_expert,
            weight.shape[0] if routing is not None else 1, 1 if shared is None else shared.shape[1],
        ),
        BITS=weight.bits, GROUP=weight.group, BY_EXPERT=routing is not None, HAS_BIAS=bias is not None,
        EVEN=inputs % steps == 0, TURNED=weight.bits == 16 and weight.data.stride(-1) != 1, FLOAT=weight.is_float,
        ZEROS=zeros is not None, SHARED=0 if codes is None else ("", "times", "divides").index(codes.kind.shared),
        SIDE=side_by_side(weight, x.device), ALIGNED=gcd(inputs // weight.group, inputs // 32 or 1, 8),
        ROWS=tile.rows, OUTPUTS=tile.outputs, INPUTS=steps, WIDE=8,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32", num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _step(weight: WeightMatrix, tile: ProductTile) -> int:
    """Inputs that a program takes at a time."""
    return tile.inputs if weight.bits == 16 else max(tile.inputs, INPUTS_IN_ORDER)


def _strides(weight: WeightMatrix) -> tuple[int, int]:
    """Of outputs and inputs, where weights are numbers."""
    return (0, 1) if weight.scales is not None else (weight.data.stride(-2), weight.data.stride(-1))


def product(
    x: torch.Tensor,
    weight: WeightMatrix,
    bias: torch.Tensor | None,
    tile: ProductTile | None = None,
    parts: int | None = None,
) -> torch.Tensor:
    """`x` (rows, inputs) by `weight` (outputs, inputs), and `bias`: (rows, outputs).

    Where tiles are few, `parts` of the inputs are summed by programs of their own (None: as many as pay).
    """
    x = in_order(x, weight)
    rows, (outputs, inputs) = x.shape[0], weight.shape
    tile = tile or tile_for(rows, weight.bits, x.device)
    row_tiles = -(-rows // tile.rows)
    out = x.new_empty(rows, outputs)
    if parts is None:
        parts = _parts(row_tiles * -(-outputs // tile.outputs), inputs, _step(weight, tile), x.device)
    if parts == 1:
        launch_product(x, weight, bias, out, tile, row_tiles, None, 1, 1)
        return out
    partly = torch.empty(parts, rows, outputs, dtype=torch.float32, device=x.device)
    launch_product(x, weight, None, partly, tile, row_tiles, None, 1, parts)
    total = rows * outputs
    _sum_parts(
        (-(-total // 1024),), (partly, x if bias is None else bias, out), (total, outputs, parts),
        HAS_BIAS=bias is not None, BLOCK=1024,
    )  # fmt: skip
    return out


def _parts(programs: int, inputs: int, step: int, device: torch.device) -> int:
    """Parts of the inputs by which so many programs keep most of the GPU busy, each of four steps at least."""
    parts, steps = 1, inputs // step
    if inputs % step:
        return 1
    while programs * parts * 2 <= _processors(device) and steps % (parts * 2) == 0 and steps // (parts * 2) >= 4:
        parts *= 2
    return parts


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may take."""
    if device.type != "cuda":
        return 1 << 62
    return int(triton.runtime.driver.active.utils.get_device_properties(device.index or 0)["max_shared_mem"])
