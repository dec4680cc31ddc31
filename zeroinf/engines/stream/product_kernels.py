"""The GPU's kernel that multiplies by weights as they rest: codes of 4 or 8 bits, or numbers, dense or by expert.

Only a process that needs it imports this: Triton comes with torch for CUDA alone. A program computes a tile of outputs
by rows of inputs, transposed: weights are the left side of the product, which tensor cores take from registers, where
codes have just become weights. Sums are in float32.
"""

# ruff: noqa: N803  constants of a kernel are written large

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
import triton
import triton.language as tl

from zeroinf.compat.launches import Launch
from zeroinf.engines.stream.coded_weight import WeightMatrix
from zeroinf.engines.stream.decode_in_registers import eight_bits, four_bit_floats, four_bits, power_of_two


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
def _by_codes(  # type: ignore[no-untyped-def]
    acc, x_at, weight, scales, first_group, begin, finish,
    BITS: tl.constexpr, GROUP: tl.constexpr, FLOAT: tl.constexpr, EVEN: tl.constexpr, INPUTS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The same by weights that are codes with scales; `first_group` (outputs,) of a row's groups."""
    scale_at = scales + first_group[:, None]
    code_at = weight + first_group[:, None, None] * (GROUP // 2 if BITS == 4 else GROUP)
    group = tl.arange(0, INPUTS // GROUP)
    if FLOAT:
        # Single bytes cannot be copied ahead of their use: those of the next step are loaded before this one's use.
        now = begin // GROUP + group
        next_scale = _load_groups(scale_at + now[None, :], now, finish // GROUP, False)
    for k in range(begin, finish, INPUTS):
        now = k // GROUP + group
        if FLOAT:
            scale, later = power_of_two(next_scale, x_at.dtype.element_ty), now + INPUTS // GROUP
            next_scale = _load_groups(scale_at + later[None, :], later, finish // GROUP, False)
        else:
            scale = _load_groups(scale_at + now[None, :], now, finish // GROUP, EVEN)
        acc = _add_groups(acc, x_at, code_at, scale[:, :, None], k, now, finish, BITS, GROUP, FLOAT, EVEN, PRECISION)
    return acc


@triton.jit  # type: ignore[untyped-decorator]
def _load_groups(at, group, end, EVEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """One value of each group: `at` (outputs, groups), of which those before `end` are there."""
    return tl.load(at) if EVEN else tl.load(at, mask=group[None, :] < end, other=0)


@triton.jit  # type: ignore[untyped-decorator]
def _add_groups(  # type: ignore[no-untyped-def]
    acc, x_at, code_at, scale, k, group, finish,
    BITS: tl.constexpr, GROUP: tl.constexpr, FLOAT: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`acc` and the product of the inputs of some groups, from input `k` on, by their codes with scales `scale`
    (outputs, groups, 1)."""
    of_group: tl.constexpr = GROUP // 2 if BITS == 4 else GROUP
    flat = tl.arange(0, scale.shape[1] * of_group)
    column = k + flat // of_group * GROUP + flat % of_group
    dtype: tl.constexpr = x_at.dtype.element_ty
    code_ptr = code_at + group[None, :, None] * of_group + tl.arange(0, of_group)[None, None, :]
    if EVEN:
        code = tl.load(code_ptr)
        low = tl.load(x_at + column[:, None])
        if BITS == 4:
            high = tl.load(x_at + column[:, None] + of_group)
    else:
        code = tl.load(code_ptr, mask=(group < finish // GROUP)[None, :, None], other=0)
        low = tl.load(x_at + column[:, None], mask=column[:, None] < finish, other=0)
        if BITS == 4:
            high = tl.load(x_at + column[:, None] + of_group, mask=column[:, None] < finish, other=0)
    if FLOAT:
        acc = tl.dot(_flat(four_bit_floats(code, scale, False, dtype)), low, acc, input_precision=PRECISION)
        acc = tl.dot(_flat(four_bit_floats(code, scale, True, dtype)), high, acc, input_precision=PRECISION)
    elif BITS == 4:
        acc = tl.dot(_flat(four_bits(code, scale, False, dtype)), low, acc, input_precision=PRECISION)
        acc = tl.dot(_flat(four_bits(code, scale, True, dtype)), high, acc, input_precision=PRECISION)
    else:
        acc = tl.dot(_flat(eight_bits(code, scale, dtype)), low, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _flat(weights):  # type: ignore[no-untyped-def]
    """`weights` (outputs, groups, of each) as (outputs, inputs)."""
    return tl.reshape(weights, (weights.shape[0], weights.shape[1] * weights.shape[2]))


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
    if BITS == 16:
        of_expert = output.to(tl.int64) if TURNED else weight_row - own_expert * outputs
        weight_at = weight + own_expert * outputs * inputs + of_expert[:, None] * output_stride
        acc = _by_numbers(acc, x_at, weight_at, begin, finish, real, input_stride, EVEN, TURNED, INPUTS, PRECISION)
    else:
        first_group = weight_row * (inputs // GROUP)
        acc = _by_codes(
            acc, x_at, weight, scales, first_group, begin, finish, BITS, GROUP, FLOAT, EVEN, INPUTS, PRECISION
        )
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
ROWS_TRIED = (12, 28, 64, 128)
"""Of each of these tiles, one."""


def tile_for(rows: int, bits: int, device: torch.device) -> ProductTile:
    """The tile for a product of `rows` rows (of one expert, on average) by weights of `bits` bits."""
    tile = next(tile for most, tile in _TILES if rows <= most)
    while tile.shared_bytes(bits) > _shared_memory(device) and (tile.stages > 2 or tile.inputs > 64):
        tile = replace(tile, stages=tile.stages - 1) if tile.stages > 2 else replace(tile, inputs=tile.inputs // 2)
    return tile


def launch_product(
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
