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
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from zeroinf.engines.stream.coded_weight import Matrix

_IS_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""On a CPU, to test kernels: bfloat16 has no arithmetic there."""


# Triton looks annotations up while it compiles, and knows none of Python's types.
@triton.jit  # type: ignore[untyped-decorator]
def _four_bits(code, scale, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Codes (rows, groups, of each) below 16 as weights, to the bit: a product of bfloat16 is exact before rounding."""
    if dtype == tl.bfloat16 and not _IS_INTERPRETED:
        # 128 and a code make 0x4300 | code in bfloat16.
        value = (code.to(tl.int16) | 0x4300).to(tl.bfloat16, bitcast=True)
        return (value - 136.0) * scale
    return ((code.to(tl.int32) - 8).to(tl.float32) * scale.to(tl.float32)).to(dtype)


@triton.jit  # type: ignore[untyped-decorator]
def _eight_bits(code, scale, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    value = (code ^ 128).to(tl.int8, bitcast=True)
    if dtype == tl.bfloat16 and not _IS_INTERPRETED:
        return value.to(tl.bfloat16) * scale
    return (value.to(tl.float32) * scale.to(tl.float32)).to(dtype)


@triton.jit  # type: ignore[untyped-decorator]
def _product(  # type: ignore[no-untyped-def]
    x, weight, scales, bias, out, slots, tiles, rows, outputs, inputs, each, x_stride, out_stride, part_stride,
    BITS: tl.constexpr, GROUP: tl.constexpr, BY_EXPERT: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, PARTS: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`tiles` (2, tiles + 1): the expert of each tile of slots and its first slot in order, then where all end."""
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
        if expert < 0:
            return
        start = tl.load(tiles + row_tiles + row_tile)
        end = tl.load(tiles + 2 * row_tiles + row_tile)
        inside = start + own < end
        row = tl.load(slots + start + own, mask=inside, other=0).to(tl.int64)
        x_row = row // each
    else:
        expert = 0
        row = row_tile.to(tl.int64) * ROWS + own
        inside = row < rows
        x_row = tl.where(inside, row, 0)
    real = output < outputs
    weight_row = tl.where(real, output, 0).to(tl.int64) + expert * outputs
    x_at = x + x_row[None, :] * x_stride
    acc = tl.zeros((OUTPUTS, ROWS), tl.float32)
    dtype: tl.constexpr = x.dtype.element_ty
    groups: tl.constexpr = INPUTS // GROUP
    group = tl.arange(0, groups)
    steps = tl.cdiv(tl.cdiv(inputs, INPUTS), PARTS)
    begin = tl.program_id(1) * steps * INPUTS
    finish = tl.minimum(begin + steps * INPUTS, inputs)
    for k in range(begin, finish, INPUTS):
        if BITS == 16:
            column = k + tl.arange(0, INPUTS)
            x_ptr, w_ptr = x_at + column[:, None], weight + weight_row[:, None] * inputs + column[None, :]
            if EVEN:
                acc = tl.dot(tl.load(w_ptr), tl.load(x_ptr), acc, input_precision=PRECISION)
            else:
                there = column < finish
                w = tl.load(w_ptr, mask=there[None, :], other=0)
                acc = tl.dot(w, tl.load(x_ptr, mask=there[:, None], other=0), acc, input_precision=PRECISION)
        else:
            of_group: tl.constexpr = GROUP // 2 if BITS == 4 else GROUP
            there = k // GROUP + group < finish // GROUP
            scale_ptr = scales + weight_row[:, None] * (inputs // GROUP) + (k // GROUP + group)[None, :]
            code_ptr = weight + (weight_row * (inputs // GROUP))[:, None, None] * of_group
            code_ptr += (k // GROUP + group)[None, :, None] * of_group + tl.arange(0, of_group)[None, None, :]
            flat = tl.arange(0, groups * of_group)
            column = k + flat // of_group * GROUP + flat % of_group
            if EVEN:
                scale = tl.load(scale_ptr)[:, :, None]
                code = tl.load(code_ptr)
                low = tl.load(x_at + column[:, None])
                if BITS == 4:
                    high = tl.load(x_at + column[:, None] + of_group)
            else:
                scale = tl.load(scale_ptr, mask=there[None, :], other=0)[:, :, None]
                code = tl.load(code_ptr, mask=there[None, :, None], other=0)
                low = tl.load(x_at + column[:, None], mask=column[:, None] < finish, other=0)
                if BITS == 4:
                    high = tl.load(x_at + column[:, None] + of_group, mask=column[:, None] < finish, other=0)
            if BITS == 4:
                w = tl.reshape(_four_bits(code & 15, scale, dtype), (OUTPUTS, groups * of_group))
                acc = tl.dot(w, low, acc, input_precision=PRECISION)
                w = tl.reshape(_four_bits(code >> 4, scale, dtype), (OUTPUTS, groups * of_group))
                acc = tl.dot(w, high, acc, input_precision=PRECISION)
            else:
                w = tl.reshape(_eight_bits(code, scale, dtype), (OUTPUTS, groups * of_group))
                acc = tl.dot(w, low, acc, input_precision=PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias + expert * outputs + output, mask=real, other=0).to(tl.float32)[:, None]
    at = out + tl.program_id(1).to(tl.int64) * part_stride + row[None, :] * out_stride + output[:, None]
    tl.store(at, acc.to(out.dtype.element_ty), mask=real[:, None] & inside[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def _sum_parts(  # type: ignore[no-untyped-def]
    parts, bias, out, total, outputs, out_stride, PARTS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < total
    acc = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        acc += tl.load(parts + part * total + at, mask=inside, other=0)
    if HAS_BIAS:
        acc += tl.load(bias + at % outputs, mask=inside, other=0).to(tl.float32)
    tl.store(out + at // outputs * out_stride + at % outputs, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _count(index, counts, rank, total, experts, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """How many slots each expert has, and of each slot how many of its expert's were counted before it."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(index + at, mask=at < total, other=-1)
    known = (expert >= 0) & (expert < experts)
    tl.store(rank + at, tl.atomic_add(counts + expert, 1, mask=known, sem="relaxed"), mask=known)


@triton.jit  # type: ignore[untyped-decorator]
def _place(  # type: ignore[no-untyped-def]
    index, counts, rank, slots, tiles, total, experts, tile_count,
    ROWS: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr, TILE_BLOCK: tl.constexpr,
):  # fmt: skip
    """Slots in order of experts, by programs past the first ones, which make the table of tiles."""
    expert = tl.arange(0, EXPERTS)
    count = tl.load(counts + expert, mask=expert < experts, other=0)
    ends = tl.cumsum(count, 0)
    table = tl.cdiv(tile_count, TILE_BLOCK)
    if tl.program_id(0) < table:
        needed = (count + ROWS - 1) // ROWS
        tile_ends = tl.cumsum(needed, 0)
        tile = tl.program_id(0) * TILE_BLOCK + tl.arange(0, TILE_BLOCK)
        is_own = (tile[:, None] >= (tile_ends - needed)[None, :]) & (tile[:, None] < tile_ends[None, :])
        used = tl.sum(is_own.to(tl.int32), 1) > 0
        of_tile = tl.sum(tl.where(is_own, expert[None, :], 0), 1)
        start = (ends - count)[None, :] + (tile[:, None] - (tile_ends - needed)[None, :]) * ROWS
        first = tl.sum(tl.where(is_own, start, 0), 1)
        end = tl.sum(tl.where(is_own, ends[None, :], 0), 1)
        inside = tile < tile_count
        tl.store(tiles + tile, tl.where(used, of_tile, -1), mask=inside)
        tl.store(tiles + tile_count + tile, first, mask=inside)
        tl.store(tiles + 2 * tile_count + tile, end, mask=inside)
    else:
        at = (tl.program_id(0) - table) * BLOCK + tl.arange(0, BLOCK)
        of_slot = tl.load(index + at, mask=at < total, other=-1)
        known = (of_slot >= 0) & (of_slot < experts)
        before = tl.load(rank + at, mask=known, other=0)
        # Experts' first places, looked up among those in registers.
        place = tl.sum(tl.where(of_slot[:, None] == expert[None, :], (ends - count)[None, :], 0), 1) + before
        tl.store(slots + place, at, mask=known)


@triton.jit  # type: ignore[untyped-decorator]
def _gate(x, out, total, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """SiLU of the first half of each row, times the second, rounded where torch's operators round."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < total
    from_here = x + at // width * (2 * width) + at % width
    gate = tl.load(from_here, mask=inside, other=0).to(tl.float32)
    up = tl.load(from_here + width, mask=inside, other=0).to(tl.float32)
    gate = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + at, (gate * up).to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _combine(y, index, weights, out, width, experts, EACH: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """For each token the sum of what its experts gave, times their weights."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for turn in tl.static_range(EACH):
        slot = token * EACH + turn
        expert = tl.load(index + slot)
        inside = (column < width) & (expert >= 0) & (expert < experts)
        value = tl.load(y + slot * width + column, mask=inside, other=0).to(tl.float32)
        acc += value * tl.load(weights + slot).to(tl.float32)
    tl.store(out + token * width + column, acc.to(out.dtype.element_ty), mask=column < width)


@dataclass(frozen=True, slots=True)
class Tile:
    """Sizes of a program's tile, and how it runs."""

    rows: int
    outputs: int
    inputs: int
    warps: int
    stages: int


def tile_for(rows: int, bits: int) -> Tile:
    """The tile for a product of `rows` rows (of one expert, on average) by weights of `bits` bits."""
    if rows <= 16:
        return Tile(16, 64, 256, 4, 4)
    if rows <= 32:
        return Tile(32, 64, 128, 4, 4)
    if rows <= 96:
        return Tile(64, 128, 128, 4, 3)
    return Tile(128, 128, 64, 8, 3)


def _launch(
    x: torch.Tensor, weight: Matrix, bias: torch.Tensor | None, out: torch.Tensor, tile: Tile, row_tiles: int,
    slots: torch.Tensor | None, tiles: torch.Tensor | None, each: int, parts: int, part_stride: int,
) -> None:  # fmt: skip
    outputs, inputs = weight.shape[-2:]
    steps = tile.inputs if weight.bits == 16 else max(tile.inputs, weight.group)
    _product[(row_tiles * triton.cdiv(outputs, tile.outputs), parts)](
        x, weight.data, x if weight.scales is None else weight.scales, x if bias is None else bias, out,
        x if slots is None else slots, x if tiles is None else tiles, x.shape[0], outputs, inputs, each,
        x.stride(0), out.stride(-2), part_stride,
        BITS=weight.bits, GROUP=weight.group, BY_EXPERT=slots is not None, HAS_BIAS=bias is not None,
        EVEN=inputs % (steps * parts) == 0, ROWS=tile.rows, OUTPUTS=tile.outputs, INPUTS=steps, PARTS=parts,
        WIDE=8 if slots is None else 1 << 16, PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def product(
    x: torch.Tensor, weight: Matrix, bias: torch.Tensor | None, tile: Tile | None = None, parts: int | None = None
) -> torch.Tensor:
    """`x` (rows, inputs) by `weight` (outputs, inputs), and `bias`: (rows, outputs)."""
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, (outputs, inputs) = x.shape[0], weight.shape
    tile = tile or tile_for(rows, weight.bits)
    row_tiles = triton.cdiv(rows, tile.rows)
    out = x.new_empty(rows, outputs)
    if parts is None:
        programs = row_tiles * triton.cdiv(outputs, tile.outputs)
        parts = min(max(1, _processors(x.device) // programs), max(1, inputs // (4 * tile.inputs)), 8)
    if parts == 1:
        _launch(x, weight, bias, out, tile, row_tiles, None, None, 1, 1, 0)
        return out
    partly = torch.empty(parts, rows, outputs, dtype=torch.float32, device=x.device)
    _launch(x, weight, None, partly, tile, row_tiles, None, None, 1, parts, rows * outputs)
    _sum_parts[(triton.cdiv(out.numel(), 1024),)](
        partly, x if bias is None else bias, out, out.numel(), outputs, outputs,
        PARTS=parts, HAS_BIAS=bias is not None, BLOCK=1024,
    )  # fmt: skip
    return out


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@dataclass(frozen=True, slots=True)
class Routing:
    """Which slots each expert computes, in tiles of `rows`."""

    slots: torch.Tensor
    tiles: torch.Tensor
    rows: int
    each: int


def route(index: torch.Tensor, experts: int, rows: int) -> Routing:
    """Of `index` (tokens, experts of each). Numbers that no expert has take no part."""
    index = index.contiguous()
    total, each = index.numel(), index.shape[1]
    tile_count = min(total, total // rows + experts)
    counts = torch.zeros(experts, dtype=torch.int32, device=index.device)
    rank, slots = (torch.empty(total, dtype=torch.int32, device=index.device) for _ in range(2))
    tiles = torch.empty(3, tile_count, dtype=torch.int32, device=index.device)
    _count[(triton.cdiv(total, 256),)](index, counts, rank, total, experts, BLOCK=256)
    wide = triton.next_power_of_2(experts)
    block = max(16, min(256, (1 << 13) // wide))
    _place[(triton.cdiv(tile_count, block) + triton.cdiv(total, block),)](
        index, counts, rank, slots, tiles, total, experts, tile_count,
        ROWS=rows, EXPERTS=wide, BLOCK=block, TILE_BLOCK=block,
    )  # fmt: skip
    return Routing(slots, tiles, rows, each)


def product_by_expert(
    x: torch.Tensor, weight: Matrix, bias: torch.Tensor | None, routing: Routing, each: int, tile: Tile
) -> torch.Tensor:
    """For every slot its row of `x` by its expert's weights: (slots, outputs). A row of `x` has `each` slots."""
    x = x if x.stride(1) == 1 else x.contiguous()
    out = x.new_empty(routing.slots.numel(), weight.shape[1])
    row_tiles = routing.tiles.shape[1]
    _launch(x, weight, bias, out, tile, row_tiles, routing.slots, routing.tiles, each, 1, 0)
    return out


def gate(x: torch.Tensor) -> torch.Tensor:
    """SiLU of the first half of columns times the second half."""
    out = x.new_empty(x.shape[0], x.shape[1] // 2)
    _gate[(triton.cdiv(out.numel(), 1024),)](x, out, out.numel(), out.shape[1], BLOCK=1024)
    return out


def combine(y: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, experts: int) -> torch.Tensor:
    """`y` (slots, width) summed by token with `weights` (tokens, experts of each)."""
    tokens, each = index.shape
    out = y.new_empty(tokens, y.shape[1])
    block = min(1024, triton.next_power_of_2(y.shape[1]))
    _combine[(tokens, triton.cdiv(y.shape[1], block))](
        y, index.contiguous(), weights.contiguous(), out, y.shape[1], experts, EACH=each, BLOCK=block
    )
    return out


def why_not(device: torch.device, dtype: torch.dtype, bits: int, group: int) -> str:
    """Why these kernels do not run on `device`, empty where they do: each tile is compiled and used once.

    What they give is compared with products of the weights: a compiler's fault must not become a model's.
    """
    try:
        experts, outputs, inputs = 4, 256, 1024
        generator = torch.Generator(device).manual_seed(0)
        elements = experts * outputs * inputs
        codes = torch.randint(0, 256, (elements * bits // 8,), dtype=torch.uint8, device=device, generator=generator)
        scales = (torch.rand(elements // group, device=device, generator=generator) * 0.01 + 0.01).bfloat16()
        low = codes.view(-1, group * bits // 8).int()
        values = torch.cat((low & 15, low >> 4), 1) - 8 if bits == 4 else low - 128
        full = (values * scales.float()[:, None]).to(dtype).float().view(experts, outputs, inputs)
        stack = Matrix(codes, scales, (experts, outputs, inputs), bits, group)
        of_one = outputs * inputs
        first = Matrix(codes[: of_one * bits // 8], scales[: of_one // group], (outputs, inputs), bits, group)
        for rows in (16, 32, 64, 128):
            x = torch.randn(rows, inputs, device=device, generator=generator).to(dtype)
            index = torch.rand(rows, experts, device=device, generator=generator).topk(2).indices
            tile = tile_for(rows, bits)
            routing = route(index, experts, tile.rows)
            found = product_by_expert(x, stack, None, routing, 2, tile)
            by_all = torch.einsum("ti,eoi->teo", x.float(), full)
            right = by_all.gather(1, index[..., None].expand(-1, -1, outputs)).flatten(0, 1)
            pairs = [(found, right), (product(x, first, None), x.float() @ full[0].T)]
            weights = torch.rand(rows, 2, device=device, generator=generator)
            summed = (found.float().view(rows, 2, outputs) * weights[..., None]).sum(1)
            pairs.append((combine(found, index, weights, experts), summed))
            gated, value = found.float().chunk(2, -1)
            pairs.append((gate(found), torch.nn.functional.silu(gated) * value))
            if any((one.float() - other).norm() > 0.01 * other.norm() for one, other in pairs):
                return "they compute something else"
    except Exception as error:  # Triton has errors of many kinds, and none of them may end a run
        return (str(error).splitlines() or [type(error).__name__])[0]
    return ""
