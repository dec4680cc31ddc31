"""The GPU's kernels of mixtures of experts: tokens are routed, multiplied by their experts' weights, gated and summed.

Only a process that needs them imports this: Triton comes with torch for CUDA alone. A row of inputs is used once for
each expert that it is routed to: its *slot* is token x experts of each + which of them. Tiles hold slots of one expert;
what is computed for a slot is written at the slot's own row, so nothing is sorted, gathered or scattered in memory.
Nothing waits for the device, and shapes depend on the number of tokens alone, so that all of it can be captured as a
CUDA graph.
"""

# ruff: noqa: N803  constants of a kernel are written large

from __future__ import annotations

from itertools import product as pairs_of

import torch
import triton
import triton.language as tl

from zeroinf.compat.launches import Launch
from zeroinf.engines.stream.coded_weight import WeightMatrix, experts_at_once
from zeroinf.engines.stream.decode_in_registers import input_of
from zeroinf.engines.stream.product_kernels import (
    ROWS_TRIED,
    ProductTile,
    SlotTable,
    in_order,
    launch_product,
    ordered_width,
    side_by_side,
    tile_for,
)
from zeroinf.model.quantized.expert_codes import expand_experts
from zeroinf.model.quantized.fused import OPERATORS
from zeroinf.planner.wire import MOST_MXFP4_ROWS_BY_EXPERT


@Launch
@triton.jit(do_not_specialize=["total"])  # type: ignore[untyped-decorator]
def _count(index, counts, rank, total, experts, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """How many slots each expert has, and of each slot how many of its expert's were counted before it. A program adds
    those of an expert at once: alike tokens go to the same experts, whose counts would be waited for."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(index + at, mask=at < total, other=-1).to(tl.int32)
    known = (expert >= 0) & (expert < experts)
    same = (expert[:, None] == expert[None, :]) & known[:, None]
    own = tl.arange(0, BLOCK)
    before = tl.sum((same & (own[None, :] < own[:, None])).to(tl.int32), 1)
    all_here = tl.sum(same.to(tl.int32), 1)
    first = known & (before == 0)
    begin = tl.atomic_add(counts + expert, all_here, mask=first, sem="relaxed")
    begin = tl.sum(tl.where(same & first[None, :], begin[None, :], 0), 1)
    tl.store(rank + at, begin + before, mask=known)


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
@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _gate(  # type: ignore[no-untyped-def]
    x, out, rows, width, wide,
    BITS: tl.constexpr, PAIRS: tl.constexpr, SIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """SiLU of the first half of each row, times the second, rounded where torch's operators round. It is written
    in the order of `input_of` for codes of BITS, with zeros past the width; in its own for numbers of 16."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    source = column if BITS == 16 else input_of(column, BITS, PAIRS, SIDE)
    inside = (row < rows) & (source < width)
    at = x + row * (2 * width) + source
    gate = tl.load(at, mask=inside, other=0).to(tl.float32)
    up = tl.load(at + width, mask=inside, other=0).to(tl.float32)
    gate = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * wide + column, (gate * up).to(out.dtype.element_ty), mask=(row < rows) & (column < wide))


@Launch
@triton.jit(do_not_specialize=["experts"])  # type: ignore[untyped-decorator]
def _gather(x, index, places, out, x_stride, width, experts, EACH: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The row of `x` of each slot, in order of experts, for those that an expert has."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + token * x_stride + column, mask=column < width, other=0)
    for turn in tl.static_range(EACH):
        expert = tl.load(index + token * EACH + turn)
        known = (expert >= 0) & (expert < experts)
        place = tl.load(places + token * EACH + turn, mask=known, other=0).to(tl.int64)
        tl.store(out + place * width + column, value, mask=(column < width) & known)


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


def route(index: torch.Tensor, experts: int, rows: int) -> SlotTable:
    """Of `index` (tokens, experts of each). Numbers that no expert has take no part."""
    index = index.contiguous()
    total = index.numel()
    tile_count = min(total, total // rows + experts)
    counts = torch.zeros(experts, dtype=torch.int32, device=index.device)
    rank, slots, places = (torch.empty(total, dtype=torch.int32, device=index.device) for _ in range(3))
    ends = torch.empty_like(counts)
    tiles = torch.empty(3, tile_count, dtype=torch.int32, device=index.device)
    _count((-(-total // 64),), (index, counts, rank), (total, experts), BLOCK=64)
    wide = 1 << (experts - 1).bit_length()
    block = max(16, min(256, (1 << 13) // wide))
    _place(
        (-(-tile_count // block) - (-total // block),),
        (index, counts, rank, slots, places, ends, tiles), (total, experts, tile_count, rows),
        EXPERTS=wide, BLOCK=block, TILE_BLOCK=block,
    )  # fmt: skip
    return SlotTable(slots, places, ends, tiles, rows)


def product_by_expert(
    x: torch.Tensor, weight: WeightMatrix, bias: torch.Tensor | None, routing: SlotTable, each: int, tile: ProductTile,
    *, is_ordered: bool = False,
) -> torch.Tensor:  # fmt: skip
    """For every slot its row of `x` by its expert's weights: (slots, outputs). A row of `x` has `each` slots, and is
    `in_order` already or not."""
    x = x if is_ordered else in_order(x, weight)
    out = x.new_empty(routing.slots.numel(), weight.shape[1])
    launch_product(x, weight, bias, out, tile, routing.tiles.shape[1], routing, each, 1)
    return out


def gate(x: torch.Tensor, before: WeightMatrix | None = None) -> torch.Tensor:
    """SiLU of the first half of columns times the second half; `in_order` for a product by `before`, if given."""
    rows, width = x.shape[0], x.shape[1] // 2
    wide, bits, has_pairs, side = width, 16, False, 0
    if before is not None and before.bits < 16:
        wide, bits, has_pairs = ordered_width(before), before.bits, before.of_checkpoint is not None
        side = side_by_side(before, x.device)
    out = x.new_empty(rows, wide)
    _gate(
        (-(-rows // 8), -(-wide // 128)), (x, out), (rows, width, wide),
        BITS=bits, PAIRS=has_pairs, SIDE=side, ROWS=8, BLOCK=128,
    )  # fmt: skip
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
    return weight.is_float and rows > MOST_MXFP4_ROWS_BY_EXPERT


def product_in_full(
    x: torch.Tensor, weight: WeightMatrix, bias: torch.Tensor | None, routing: SlotTable, each: int, tile: ProductTile
) -> torch.Tensor:
    """As `product_by_expert` by codes that are numbers, with inputs in their own order: some experts after the others
    are expanded into the same memory, and multiplied."""
    assert weight.of_checkpoint is not None
    x = x if x.stride(1) == 1 else x.contiguous()
    count, outputs, inputs = weight.shape
    whole = x.new_empty(experts_at_once(weight), outputs, inputs)
    out = x.new_empty(routing.slots.numel(), outputs)
    for first in range(0, count, len(whole)):
        some = slice(first, first + len(whole))
        own = whole[: min(count, some.stop) - first]
        expand_experts(own, weight.of_checkpoint.some(some))
        full = WeightMatrix(own, None, tuple(own.shape), 16, 1)
        launch_product(x, full, bias, out, tile, routing.tiles.shape[1], routing, each, 1, first)
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
        assert weight.of_checkpoint is not None
        whole = torch.empty(experts_at_once(weight), *weight.shape[1:], dtype=dtype, device="meta")
        own.append(WeightMatrix(whole, None, tuple(whole.shape), 16, 1))
        name, args = weight.of_checkpoint.some(slice(len(whole))).expansion(whole)
        OPERATORS[name].compile(device, *args)
    for matrix, rows in pairs_of(own, ROWS_TRIED):
        tile = tile_for(rows, matrix.bits, device)
        routing = SlotTable(meta(each), meta(each), meta(weight.shape[0]), meta(3, each), tile.rows)
        product_by_expert(meta(1, weight.shape[2]).to(dtype), matrix, bias, routing, each, tile)


def gather(x: torch.Tensor, index: torch.Tensor, routing: SlotTable) -> torch.Tensor:
    """The row of `x` (tokens, width) of each slot, in order of experts: (slots, width). Nothing is written past the
    last one that an expert has. `index` (tokens, experts of each) is what was routed."""
    x = x if x.stride(1) == 1 else x.contiguous()
    (tokens, each), width = index.shape, x.shape[1]
    out = x.new_empty(index.numel(), width)
    block = min(1024, 1 << (width - 1).bit_length())
    _gather(
        (tokens, -(-width // block)), (x, index.contiguous(), routing.places, out),
        (x.stride(0), width, routing.ends.numel()), EACH=each, BLOCK=block,
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
