"""The GPU's kernels that multiply by weights as they rest: codes of 4 or 8 bits, or numbers, dense or by expert.

Only a process that needs them imports this: Triton comes with torch for CUDA alone. A program computes a tile of
outputs by rows of inputs, transposed: weights are the left side of the product, which tensor cores take from registers,
where codes have just become weights. They become what `codes.decode` makes of them, to the bit; sums are in float32.

By expert, a row of inputs is used once for each expert that it is routed to: its *slot* is token x experts of each +
which of them. Tiles hold slots of one expert; what is computed for a slot is written at the slot's own row, so nothing
is sorted, gathered or scattered in memory. Nothing waits for the device, and shapes depend on the number of tokens
alone, so that all of it can be captured as a CUDA graph.
"""

# ruff: noqa: N803  constants of a kernel are written large

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cache
from itertools import product as pairs_of
from math import prod

import torch
import triton
import triton.language as tl

from zeroinf.compat.launches import Launch
from zeroinf.engines.stream.coded_weight import WeightMatrix, experts_at_once, in_halves
from zeroinf.model.quantized.fp4 import expand_fp4
from zeroinf.model.quantized.fused import OPERATORS
from zeroinf.planner.wire import MOST_ROWS_BY_EXPERT, Codes

_IS_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""On a CPU, to test kernels: bfloat16 has no arithmetic there."""


# Triton looks annotations up while it compiles, and knows none of Python's types.
# Two bytes, each of two codes, to two bfloat16: 128 and a code below 16 make 0x4300 | code.
_FOUR_LOW = tl.constexpr("""{
.reg .b32 a;
cvt.u32.u16 a, $1;
prmt.b32 a, a, 0x43434343, 0x4140;
and.b32 $0, a, 0xff0fff0f;
}""")
_FOUR_HIGH = tl.constexpr("""{
.reg .b32 a;
cvt.u32.u16 a, $1;
prmt.b32 a, a, 0x43434343, 0x4140;
shr.u32 a, a, 4;
lop3.b32 $0, a, 0x000f000f, 0x43004300, 0xEA;
}""")


@triton.jit  # type: ignore[untyped-decorator]
def _four_bits(code, scale, is_high: tl.constexpr, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Half of the codes (rows, groups, of each) as weights, to the bit: in bfloat16 nothing is rounded but products."""
    if dtype == tl.bfloat16 and not _IS_INTERPRETED:
        assembly: tl.constexpr = _FOUR_HIGH if is_high else _FOUR_LOW
        value = tl.inline_asm_elementwise(assembly, "=r,h", [code], dtype=tl.bfloat16, is_pure=True, pack=2)
        return (value - 136.0) * scale
    code = code >> 4 if is_high else code & 15
    return ((code.to(tl.int32) - 8).to(tl.float32) * scale.to(tl.float32)).to(dtype)


# Two bytes, each of two numbers of four bits, to two bfloat16 whose exponents are too low by 126.
_FLOAT_LOW = tl.constexpr("""{
.reg .b32 a, s, e;
cvt.u32.u16 a, $1;
prmt.b32 a, a, 0, 0x4140;
shl.b32 s, a, 12;
shl.b32 e, a, 6;
and.b32 e, e, 0x01c001c0;
lop3.b32 $0, s, 0x80008000, e, 0xEA;
}""")
_FLOAT_HIGH = tl.constexpr("""{
.reg .b32 a, s, e;
cvt.u32.u16 a, $1;
prmt.b32 a, a, 0, 0x4140;
shl.b32 s, a, 8;
shl.b32 e, a, 2;
and.b32 e, e, 0x01c001c0;
lop3.b32 $0, s, 0x80008000, e, 0xEA;
}""")


@triton.jit  # type: ignore[untyped-decorator]
def _four_bit_floats(code, scale, is_high: tl.constexpr, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """The same for E2M1, a sign, two bits of exponent and one of mantissa: nothing is rounded in bfloat16."""
    if dtype == tl.bfloat16 and not _IS_INTERPRETED:
        assembly: tl.constexpr = _FLOAT_HIGH if is_high else _FLOAT_LOW
        value = tl.inline_asm_elementwise(assembly, "=r,h", [code], dtype=tl.bfloat16, is_pure=True, pack=2)
        return value * 8.507059173023462e37 * scale
    code = (code >> 4 if is_high else code & 15).to(tl.int32)
    value = (((code & 8) << 28) | ((code & 7) << 22)).to(tl.float32, bitcast=True) * 8.507059173023462e37
    return (value * scale.to(tl.float32)).to(dtype)


@triton.jit  # type: ignore[untyped-decorator]
def _power_of_two(code, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """What a byte stands for as the exponent of a scale."""
    bits = tl.where(code == 0, 0x00400000, code.to(tl.int32) << 23)
    return bits.to(tl.float32, bitcast=True).to(dtype)


@triton.jit  # type: ignore[untyped-decorator]
def _eight_bits(code, scale, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    value = (code ^ 128).to(tl.int8, bitcast=True)
    if dtype == tl.bfloat16 and not _IS_INTERPRETED:
        return value.to(tl.bfloat16) * scale
    return (value.to(tl.float32) * scale.to(tl.float32)).to(dtype)


@Launch
@triton.jit(do_not_specialize=["rows", "first_expert", "experts"])  # type: ignore[untyped-decorator]
def _product(  # type: ignore[no-untyped-def]
    x, weight, scales, bias, out, slots, tiles, rows, outputs, inputs, each, x_stride, output_stride, input_stride,
    out_stride, part_stride, first_expert, experts,
    BITS: tl.constexpr, GROUP: tl.constexpr, BY_EXPERT: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN: tl.constexpr,
    TURNED: tl.constexpr, FLOAT: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`tiles` (3, tiles): the expert of each tile of slots, its first slot in order, and where the expert's end. Those
    are computed that go to one of `experts` experts from `first_expert` on, of which `weight` has the weights.

    `TURNED`: the outputs of numbers lie side by side. They are loaded by a mask then, since addresses that do not
    follow each other everywhere are read one by one.
    """
    row_tiles = tl.num_programs(0) // tl.cdiv(outputs, OUTPUTS)
    # Programs side by side take the tiles of rows that share weights, WIDE of them at most.
    program = tl.program_id(0)
    across = tl.cdiv(outputs, OUTPUTS)
    first = program // (WIDE * across) * WIDE
    wide = tl.minimum(row_tiles - first, WIDE)
    row_tile = first + program % (WIDE * across) % wide
    output = program % (WIDE * across) // wide * OUTPUTS + tl.arange(0, OUTPUTS)
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
    of_expert = output.to(tl.int64) if TURNED else weight_row - own_expert * outputs
    weight_at = weight + own_expert * outputs * inputs + of_expert[:, None] * output_stride
    x_at = x + x_row[None, :] * x_stride
    acc = tl.zeros((OUTPUTS, ROWS), tl.float32)
    dtype: tl.constexpr = x.dtype.element_ty
    groups: tl.constexpr = INPUTS // GROUP
    group = tl.arange(0, groups)
    steps = tl.cdiv(tl.cdiv(inputs, INPUTS), tl.num_programs(1))
    begin = tl.program_id(1) * steps * INPUTS
    finish = tl.minimum(begin + steps * INPUTS, inputs)
    if FLOAT:
        # Single bytes cannot be copied ahead of their use: those of the next step are loaded before this one is used.
        power_at = scales + weight_row[:, None] * (inputs // GROUP) + group[None, :]
        next_power = tl.load(power_at + begin // GROUP, mask=begin // GROUP + group[None, :] < finish // GROUP, other=0)
    for k in range(begin, finish, INPUTS):
        if BITS == 16:
            column = k + tl.arange(0, INPUTS)
            x_ptr, w_ptr = x_at + column[:, None], weight_at + column[None, :] * input_stride
            if EVEN and not TURNED:
                acc = tl.dot(tl.load(w_ptr), tl.load(x_ptr), acc, input_precision=PRECISION)
            else:
                there = column < finish
                w = tl.load(w_ptr, mask=(there[None, :] & real[:, None]) if TURNED else there[None, :], other=0)
                acc = tl.dot(w, tl.load(x_ptr, mask=there[:, None], other=0), acc, input_precision=PRECISION)
        else:
            of_group: tl.constexpr = GROUP // 2 if BITS == 4 else GROUP
            there = k // GROUP + group < finish // GROUP
            scale_ptr = scales + weight_row[:, None] * (inputs // GROUP) + (k // GROUP + group)[None, :]
            code_ptr = weight + (weight_row * (inputs // GROUP))[:, None, None] * of_group
            code_ptr += (k // GROUP + group)[None, :, None] * of_group + tl.arange(0, of_group)[None, None, :]
            flat = tl.arange(0, groups * of_group)
            column = k + flat // of_group * GROUP + flat % of_group
            if FLOAT:
                scale = _power_of_two(next_power, dtype)[:, :, None]
                later = (k + INPUTS) // GROUP
                next_power = tl.load(power_at + later, mask=later + group[None, :] < finish // GROUP, other=0)
            elif EVEN:
                scale = tl.load(scale_ptr)[:, :, None]
            else:
                scale = tl.load(scale_ptr, mask=there[None, :], other=0)[:, :, None]
            if EVEN:
                code = tl.load(code_ptr)
                low = tl.load(x_at + column[:, None])
                if BITS == 4:
                    high = tl.load(x_at + column[:, None] + of_group)
            else:
                code = tl.load(code_ptr, mask=there[None, :, None], other=0)
                low = tl.load(x_at + column[:, None], mask=column[:, None] < finish, other=0)
                if BITS == 4:
                    high = tl.load(x_at + column[:, None] + of_group, mask=column[:, None] < finish, other=0)
            if FLOAT:
                w = tl.reshape(_four_bit_floats(code, scale, False, dtype), (OUTPUTS, groups * of_group))
                acc = tl.dot(w, low, acc, input_precision=PRECISION)
                w = tl.reshape(_four_bit_floats(code, scale, True, dtype), (OUTPUTS, groups * of_group))
                acc = tl.dot(w, high, acc, input_precision=PRECISION)
            elif BITS == 4:
                w = tl.reshape(_four_bits(code, scale, False, dtype), (OUTPUTS, groups * of_group))
                acc = tl.dot(w, low, acc, input_precision=PRECISION)
                w = tl.reshape(_four_bits(code, scale, True, dtype), (OUTPUTS, groups * of_group))
                acc = tl.dot(w, high, acc, input_precision=PRECISION)
            else:
                w = tl.reshape(_eight_bits(code, scale, dtype), (OUTPUTS, groups * of_group))
                acc = tl.dot(w, low, acc, input_precision=PRECISION)
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


@Launch
@triton.jit(do_not_specialize=["total"])  # type: ignore[untyped-decorator]
def _count(index, counts, rank, total, experts, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """How many slots each expert has, and of each slot how many of its expert's were counted before it."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(index + at, mask=at < total, other=-1)
    known = (expert >= 0) & (expert < experts)
    tl.store(rank + at, tl.atomic_add(counts + expert, 1, mask=known, sem="relaxed"), mask=known)


@Launch
@triton.jit(do_not_specialize=["total", "tile_count", "rows"])  # type: ignore[untyped-decorator]
def _place(  # type: ignore[no-untyped-def]
    index, counts, rank, slots, places, all_ends, tiles, total, experts, tile_count, rows,
    EXPERTS: tl.constexpr, BLOCK: tl.constexpr, TILE_BLOCK: tl.constexpr,
):  # fmt: skip
    """Slots in order of experts, and their places there, by programs past the first ones, which make the table of tiles
    and say where each expert's slots end."""
    expert = tl.arange(0, EXPERTS)
    count = tl.load(counts + expert, mask=expert < experts, other=0)
    ends = tl.cumsum(count, 0)
    table = tl.cdiv(tile_count, TILE_BLOCK)
    if tl.program_id(0) < table:
        needed = (count + rows - 1) // rows
        tile_ends = tl.cumsum(needed, 0)
        tile = tl.program_id(0) * TILE_BLOCK + tl.arange(0, TILE_BLOCK)
        is_own = (tile[:, None] >= (tile_ends - needed)[None, :]) & (tile[:, None] < tile_ends[None, :])
        used = tl.sum(is_own.to(tl.int32), 1) > 0
        of_tile = tl.sum(tl.where(is_own, expert[None, :], 0), 1)
        start = (ends - count)[None, :] + (tile[:, None] - (tile_ends - needed)[None, :]) * rows
        first = tl.sum(tl.where(is_own, start, 0), 1)
        end = tl.sum(tl.where(is_own, ends[None, :], 0), 1)
        inside = tile < tile_count
        tl.store(tiles + tile, tl.where(used, of_tile, -1), mask=inside)
        tl.store(tiles + tile_count + tile, first, mask=inside)
        tl.store(tiles + 2 * tile_count + tile, end, mask=inside)
        if tl.program_id(0) == 0:
            tl.store(all_ends + expert, ends, mask=expert < experts)
    else:
        at = (tl.program_id(0) - table) * BLOCK + tl.arange(0, BLOCK)
        of_slot = tl.load(index + at, mask=at < total, other=-1)
        known = (of_slot >= 0) & (of_slot < experts)
        before = tl.load(rank + at, mask=known, other=0)
        # Experts' first places, looked up among those in registers.
        place = tl.sum(tl.where(of_slot[:, None] == expert[None, :], (ends - count)[None, :], 0), 1) + before
        tl.store(slots + place, at, mask=known)
        tl.store(places + at, place, mask=known)


@Launch
@triton.jit(do_not_specialize=["total"])  # type: ignore[untyped-decorator]
def _gate(x, out, total, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """SiLU of the first half of each row, times the second, rounded where torch's operators round."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < total
    from_here = x + at // width * (2 * width) + at % width
    gate = tl.load(from_here, mask=inside, other=0).to(tl.float32)
    up = tl.load(from_here + width, mask=inside, other=0).to(tl.float32)
    gate = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + at, (gate * up).to(out.dtype.element_ty), mask=inside)


@Launch
@triton.jit  # type: ignore[untyped-decorator]
def _gather(x, slots, ends, out, each, width, experts, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The row of `x` of each slot, in order of experts; zeros past the last one that an expert has."""
    place = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    known = place < tl.load(ends + experts - 1)
    row = tl.load(slots + place, mask=known, other=0).to(tl.int64) // each
    value = tl.load(x + row * width + column, mask=(column < width) & known, other=0)
    tl.store(out + place * width + column, value, mask=column < width)


@Launch
@triton.jit  # type: ignore[untyped-decorator]
def _add_bias(y, bias, ends, width, experts, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Adds to each row of `y`, in order of experts, the bias of its expert; nothing to those past the last one."""
    place = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    number = tl.arange(0, EXPERTS)
    end = tl.load(ends + number, mask=number < experts, other=0)
    expert = tl.sum(((end <= place) & (number < experts)).to(tl.int32), 0)
    inside = (column < width) & (expert < experts)
    at = y + place * width + column
    value = tl.load(bias + expert.to(tl.int64) * width + column, mask=inside, other=0).to(tl.float32)
    value += tl.load(at, mask=inside, other=0).to(tl.float32)
    tl.store(at, value.to(y.dtype.element_ty), mask=inside)


@Launch
@triton.jit  # type: ignore[untyped-decorator]
def _combine(  # type: ignore[no-untyped-def]
    y, places, index, weights, out, width, experts, EACH: tl.constexpr, IN_ORDER: tl.constexpr, BLOCK: tl.constexpr
):
    """For each token the sum of what its experts gave, times their weights."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for turn in tl.static_range(EACH):
        slot = token * EACH + turn
        expert = tl.load(index + slot)
        inside = (column < width) & (expert >= 0) & (expert < experts)
        row = tl.load(places + slot).to(tl.int64) if IN_ORDER else slot
        value = tl.load(y + row * width + column, mask=inside, other=0).to(tl.float32)
        acc += value * tl.load(weights + slot).to(tl.float32)
    tl.store(out + token * width + column, acc.to(out.dtype.element_ty), mask=column < width)


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
ROWS_TRIED = (12, 28, 64, 128)
"""Of each of these tiles, one."""


def tile_for(rows: int, bits: int, device: torch.device) -> ProductTile:
    """The tile for a product of `rows` rows (of one expert, on average) by weights of `bits` bits."""
    tile = next(tile for most, tile in _TILES if rows <= most)
    while tile.shared_bytes(bits) > _shared_memory(device) and (tile.stages > 2 or tile.inputs > 64):
        tile = replace(tile, stages=tile.stages - 1) if tile.stages > 2 else replace(tile, inputs=tile.inputs // 2)
    return tile


def _launch(
    x: torch.Tensor, weight: WeightMatrix, bias: torch.Tensor | None, out: torch.Tensor, tile: ProductTile,
    row_tiles: int, routing: SlotTable | None, each: int, parts: int, first_expert: int = 0,
) -> None:  # fmt: skip
    """Into `out` (rows or slots, outputs), or its `parts` of sums over inputs (parts, rows, outputs). `weight` has the
    experts from `first_expert` on."""
    outputs, inputs = weight.shape[-2:]
    steps = _step(weight, tile)
    rows, slots, tiles = x.shape[0], x, x
    if routing is not None:
        slots, tiles = routing.slots, routing.tiles
    scales = x if weight.scales is None else weight.scales
    part_stride = 0 if parts == 1 else rows * outputs
    run = _product.compile if x.is_meta else _product
    run(
        (row_tiles * -(-outputs // tile.outputs), parts),
        (x, weight.data, scales, x if bias is None else bias, out, slots, tiles),
        (
            rows, outputs, inputs, each, x.stride(0), *_strides(weight), outputs, part_stride, first_expert,
            weight.shape[0] if routing is not None else 1,
        ),
        BITS=weight.bits, GROUP=weight.group, BY_EXPERT=routing is not None, HAS_BIAS=bias is not None,
        EVEN=inputs % steps == 0, TURNED=weight.bits == 16 and weight.data.stride(-1) != 1, FLOAT=weight.is_float,
        ROWS=tile.rows, OUTPUTS=tile.outputs, INPUTS=steps, WIDE=8,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32", num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _step(weight: WeightMatrix, tile: ProductTile) -> int:
    """Inputs that a program takes at a time."""
    return tile.inputs if weight.bits == 16 else max(tile.inputs, weight.group)


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
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, (outputs, inputs) = x.shape[0], weight.shape
    tile = tile or tile_for(rows, weight.bits, x.device)
    row_tiles = -(-rows // tile.rows)
    out = x.new_empty(rows, outputs)
    if parts is None:
        parts = _parts(row_tiles * -(-outputs // tile.outputs), inputs, _step(weight, tile), x.device)
    if parts == 1:
        _launch(x, weight, bias, out, tile, row_tiles, None, 1, 1)
        return out
    partly = torch.empty(parts, rows, outputs, dtype=torch.float32, device=x.device)
    _launch(x, weight, None, partly, tile, row_tiles, None, 1, parts)
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


def route(index: torch.Tensor, experts: int, rows: int) -> SlotTable:
    """Of `index` (tokens, experts of each). Numbers that no expert has take no part."""
    index = index.contiguous()
    total = index.numel()
    tile_count = min(total, total // rows + experts)
    counts = torch.zeros(experts, dtype=torch.int32, device=index.device)
    rank, slots, places = (torch.empty(total, dtype=torch.int32, device=index.device) for _ in range(3))
    ends = torch.empty_like(counts)
    tiles = torch.empty(3, tile_count, dtype=torch.int32, device=index.device)
    _count((-(-total // 256),), (index, counts, rank), (total, experts), BLOCK=256)
    wide = 1 << (experts - 1).bit_length()
    block = max(16, min(256, (1 << 13) // wide))
    _place(
        (-(-tile_count // block) - (-total // block),),
        (index, counts, rank, slots, places, ends, tiles), (total, experts, tile_count, rows),
        EXPERTS=wide, BLOCK=block, TILE_BLOCK=block,
    )  # fmt: skip
    return SlotTable(slots, places, ends, tiles, rows)


def product_by_expert(
    x: torch.Tensor, weight: WeightMatrix, bias: torch.Tensor | None, routing: SlotTable, each: int, tile: ProductTile
) -> torch.Tensor:
    """For every slot its row of `x` by its expert's weights: (slots, outputs). A row of `x` has `each` slots, and is
    `in_halves` where weights are numbers of four bits."""
    x = x if x.stride(1) == 1 else x.contiguous()
    out = x.new_empty(routing.slots.numel(), weight.shape[1])
    _launch(x, weight, bias, out, tile, routing.tiles.shape[1], routing, each, 1)
    return out


def gate(x: torch.Tensor) -> torch.Tensor:
    """SiLU of the first half of columns times the second half."""
    out = x.new_empty(x.shape[0], x.shape[1] // 2)
    total = out.numel()
    _gate((-(-total // 1024),), (x, out), (total, out.shape[1]), BLOCK=1024)
    return out


def compile_for(experts: int, each: int, device: torch.device, dtype: torch.dtype) -> None:
    """Compile what hangs on the number of experts, and of those of a token, by using it once."""
    index = torch.arange(each, device=device).repeat(2, 1)
    x, weights = (
        torch.zeros(2 * each, 1024, device=device, dtype=dtype),
        torch.zeros(2, each, device=device, dtype=dtype),
    )
    routing = route(index, experts, 16)
    combine(x, index, weights, experts)
    combine(x, index, weights, experts, routing)


def are_in_full(weight: WeightMatrix, rows: int) -> bool:
    """Whether codes become weights before a product of so many rows of each expert."""
    return weight.is_float and rows > MOST_ROWS_BY_EXPERT


def product_in_full(
    x: torch.Tensor, weight: WeightMatrix, bias: torch.Tensor | None, routing: SlotTable, each: int, tile: ProductTile
) -> torch.Tensor:
    """As `product_by_expert` by codes that are numbers, with inputs in their own order: some experts after the others
    are expanded into the same memory, and multiplied."""
    assert weight.scales is not None
    x = x if x.stride(1) == 1 else x.contiguous()
    count, outputs, inputs = weight.shape
    whole = x.new_empty(experts_at_once(weight), outputs, inputs)
    out = x.new_empty(routing.slots.numel(), outputs)
    for first in range(0, count, len(whole)):
        some = slice(first, first + len(whole))
        own = whole[: min(count, some.stop) - first]
        expand_fp4(own, weight.data[some].view(len(own), outputs, -1), weight.scales[some], None, False)
        full = WeightMatrix(own, None, tuple(own.shape), 16, 1)
        _launch(x, full, bias, out, tile, routing.tiles.shape[1], routing, each, 1, first)
    return out


def compile_product_by_expert(
    weight: WeightMatrix, bias: torch.Tensor | None, each: int, device: torch.device, dtype: torch.dtype
) -> None:
    """Compile for `device`, the current GPU, what `product_by_expert` launches for inputs of `dtype`, of however many
    rows; `weight` and `bias` are on the meta device."""

    def meta(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device="meta")

    own = [weight]
    if weight.is_float:
        whole = torch.empty(experts_at_once(weight), *weight.shape[1:], dtype=dtype, device="meta")
        own.append(WeightMatrix(whole, None, tuple(whole.shape), 16, 1))
        some = torch.empty(len(whole), weight.shape[1], weight.shape[2] // 2, dtype=torch.uint8, device="meta")
        powers = some.new_empty(*weight.shape[:2], weight.shape[2] // weight.group)[: len(whole)]
        OPERATORS["expand_fp4"].compile(device, whole, some, powers, None, False)
    for matrix, rows in pairs_of(own, ROWS_TRIED):
        tile = tile_for(rows, matrix.bits, device)
        routing = SlotTable(meta(each), meta(each), meta(weight.shape[0]), meta(3, each), tile.rows)
        product_by_expert(meta(1, weight.shape[2]).to(dtype), matrix, bias, routing, each, tile)


def gather(x: torch.Tensor, routing: SlotTable, each: int) -> torch.Tensor:
    """The row of `x` (tokens, width) of each slot, in order of experts: (slots, width). A row has `each` slots."""
    x, slots = x.contiguous(), routing.slots.numel()
    width = x.shape[1]
    out = x.new_empty(slots, width)
    block = min(1024, 1 << (width - 1).bit_length())
    _gather(
        (slots, -(-width // block)), (x, routing.slots, routing.ends, out), (each, width, routing.ends.numel()),
        BLOCK=block,
    )  # fmt: skip
    return out


def add_bias(y: torch.Tensor, bias: torch.Tensor, routing: SlotTable) -> None:
    """Add to the rows of `y` (slots, width), in order of experts, the rows of `bias` (experts, width)."""
    (slots, width), experts = y.shape, bias.shape[0]
    block = min(1024, 1 << (width - 1).bit_length())
    _add_bias(
        (slots, -(-width // block)), (y, bias.contiguous(), routing.ends), (width, experts),
        EXPERTS=1 << (experts - 1).bit_length(), BLOCK=block,
    )  # fmt: skip


def combine(
    y: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, experts: int, routing: SlotTable | None = None
) -> torch.Tensor:
    """`y` (slots, width) summed by token with `weights` (tokens, experts of each); its rows are in order of slots, or
    of experts as `routing` has it."""
    tokens, each = index.shape
    width = y.shape[1]
    out = y.new_empty(tokens, width)
    block = min(1024, 1 << (width - 1).bit_length())
    _combine(
        (tokens, -(-width // block)),
        (y, index if routing is None else routing.places, index.contiguous(), weights.contiguous(), out),
        (width, experts), EACH=each, IN_ORDER=routing is not None, BLOCK=block,
    )  # fmt: skip
    return out


def why_not(device: torch.device, dtype: torch.dtype, kind: Codes, each: int = 0) -> str:
    """Why these kernels do not run on `device`, empty where they do: each is compiled and used once, those of experts
    where a token goes to `each` of them, or (0) the dense ones. Codes of 16 bits are the weights themselves.

    What they give is compared with products of the weights: a compiler's fault must not become a model's.
    """
    try:
        for rows in ROWS_TRIED:
            generator = torch.Generator(device).manual_seed(rows)
            weights = _example((max(4, each), 256, 1024), device, dtype, kind, generator)
            x = torch.randn(rows, 1024, device=device, generator=generator).to(dtype)
            pairs = _by_expert(x, *weights, each, generator) if each else _dense(x, *weights)
            if any(bool((one.float() - other).norm() > 0.01 * other.norm()) for one, other in pairs):
                return f"products of {rows} rows are not those of the weights"
    except Exception as error:  # Triton has errors of many kinds, and none of them may end a run
        return (str(error).splitlines() or [type(error).__name__])[0]
    return ""


_Pairs = list[tuple[torch.Tensor, torch.Tensor]]


def _dense(x: torch.Tensor, stack: WeightMatrix, full: torch.Tensor) -> _Pairs:
    """What products give, with what they should."""
    outputs, inputs = stack.shape[1:]
    first = WeightMatrix(stack.data[0], None, (outputs, inputs), 16, 1)
    if stack.scales is not None:
        elements = outputs * inputs
        codes, scales = stack.data[: elements * stack.bits // 8], stack.scales[: elements // stack.group]
        first = WeightMatrix(codes, scales, (outputs, inputs), stack.bits, stack.group)
    right, bias = x.float() @ full[0].T, x[0, :outputs]
    found = [(product(x, first, None, parts=parts), right) for parts in (1, 2)]
    return [*found, *((product(x, first, bias, parts=parts), right + bias.float()) for parts in (1, 2))]


def _by_expert(
    x: torch.Tensor, stack: WeightMatrix, full: torch.Tensor, each: int, generator: torch.Generator
) -> _Pairs:
    rows, (experts, outputs, _) = x.shape[0], stack.shape
    index = torch.rand(rows, experts, device=x.device, generator=generator).topk(each).indices
    tile = tile_for(rows, stack.bits, x.device)
    routing = route(index, experts, tile.rows)
    read = in_halves(x, stack)
    found = product_by_expert(read, stack, None, routing, each, tile)
    right = torch.einsum("ti,eoi->teo", x.float(), full)
    right = right.gather(1, index[..., None].expand(-1, -1, outputs)).flatten(0, 1)
    tiles = tile_for(rows, 16, x.device)
    expanded = (
        product_in_full(x, stack, None, route(index, experts, tiles.rows), each, tiles) if stack.is_float else found
    )
    again = product_by_expert(read.repeat_interleave(each, 0), stack, None, routing, 1, tile)
    weights = torch.rand(rows, each, device=x.device, generator=generator).to(x.dtype)
    summed = (found.float().view(rows, each, outputs) * weights.float()[..., None]).sum(1)
    gated, value = found.float().chunk(2, -1)
    in_order = gather(x, routing, each)
    bias = x[:experts].contiguous()
    biased = in_order.clone()
    add_bias(biased, bias, routing)
    of_slot = (x.float().repeat_interleave(each, 0) + bias[index.flatten()].float())[routing.slots.long()]
    return [
        (biased, of_slot), (expanded, right),
        (found, right), (again, right), (combine(found, index, weights, experts), summed),
        (combine(in_order, index, weights, experts, routing), x.float() * weights.float().sum(1, keepdim=True)),
        (gate(found), torch.nn.functional.silu(gated) * value),
    ]  # fmt: skip


def _example(
    shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype, kind: Codes, generator: torch.Generator
) -> tuple[WeightMatrix, torch.Tensor]:
    """Weights as they rest, and in full in float32."""
    bits, group = kind.bits, kind.group
    if bits == 16:
        weight = torch.randn(shape, device=device, generator=generator).to(dtype)
        return WeightMatrix(weight, None, shape, 16, 1), weight.float()
    elements = prod(shape)
    codes = torch.randint(0, 256, (elements * bits // 8,), dtype=torch.uint8, device=device, generator=generator)
    if kind.is_float:
        powers = torch.randint(118, 126, (elements // group,), device=device, generator=generator)
        both = torch.stack((codes & 15, codes >> 4), 1).flatten().long()
        sizes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], device=device)[both & 7]
        numbers = torch.where(both > 7, -sizes, sizes).view(-1, group) * (powers - 127.0).exp2()[:, None]
        blocks, powers = codes.view(*shape[:2], -1, group // 2), powers.to(torch.uint8).view(*shape[:2], -1)
        return WeightMatrix(blocks, powers, shape, bits, group, True), numbers.view(shape)
    scales = (torch.rand(elements // group, device=device, generator=generator) * 0.01 + 0.01).bfloat16()
    low = codes.view(-1, group * bits // 8).int()
    values = torch.cat((low & 15, low >> 4), 1) - 8 if bits == 4 else low - 128
    full = (values * scales.float()[:, None]).to(dtype).float().view(shape)
    return WeightMatrix(codes, scales, shape, bits, group), full
