"""The GPU's kernels for attention over pages. Only a process that needs them imports this: Triton comes with torch for
CUDA alone.

A block of queries, of one row and of all heads that share keys, fills the rows of one product: the next token of a row
is a block of its own, prompts come in larger ones. Keys are read where they lie: those that were there before in pages,
or, fetched from host memory, side by side, codes of a byte with their scales; those of a prompt's new tokens among the
forward's own. Where few rows have long contexts, several programs share the keys of a block, and another kernel puts
their parts together. Sums are in float32, products of float32 are exact.
"""

# ruff: noqa: N803  constants of a kernel are written large

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from zeroinf.compat.launches import BoundLaunch, Launch
from zeroinf.generation.attention import MOST_PARTS, PackedLayer, Scores, Tokens, parts_elements
from zeroinf.generation.upload import to_device
from zeroinf.model.cache_layout import PAGE_TOKENS

_LOG2_E = tl.constexpr(1.4426950408889634)
_LOWEST = tl.constexpr(-1e30)

# Programs that copy over a link at the least: each waits for what it reads most of the time.
_COPYING_PROGRAMS = 64

# Keys that are worth a program of their own.
_SHORTEST_SPLIT = 256


_IS_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""On a CPU, to test kernels: CUDA's functions are not there."""


# Triton looks annotations up while it compiles, and knows none of Python's types.
@triton.jit
def _tanh(x):  # type: ignore[no-untyped-def]
    if _IS_INTERPRETED:
        return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)
    return libdevice.tanh(x)


@Launch
@triton.jit  # type: ignore[untyped-decorator]
def _write(  # type: ignore[no-untyped-def]
    new_keys, new_values, keys, values, places, key_t, key_h, key_w, value_t, value_h, value_w,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, KEY_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    place = tl.load(places + token)
    at = tl.arange(0, KEY_BLOCK)
    given = new_keys + token * key_t + (at // WIDTH).to(tl.int64) * key_h + (at % WIDTH) * key_w
    tl.store(keys + place * HEADS * WIDTH + at, tl.load(given, mask=at < HEADS * WIDTH), mask=at < HEADS * WIDTH)
    at = tl.arange(0, VALUE_BLOCK)
    inside = at < HEADS * VALUE_WIDTH
    given = new_values + token * value_t + (at // VALUE_WIDTH).to(tl.int64) * value_h + (at % VALUE_WIDTH) * value_w
    tl.store(values + place * HEADS * VALUE_WIDTH + at, tl.load(given, mask=inside), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _scored(  # type: ignore[no-untyped-def]
    q, k, v, sees, scale, softcap, acc, highest, total,
    CAPPED: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys: (product rows, keys), which all queries see where it is not MASKED. Scores are kept as powers
    of two."""
    x = tl.dot(q, k, input_precision=PRECISION)
    x = softcap * _LOG2_E * _tanh(x * scale / softcap) if CAPPED else x * (scale * _LOG2_E)
    if MASKED:
        x = tl.where(sees, x, _LOWEST)
    now = tl.maximum(highest, tl.max(x, 1))
    weights = tl.exp2(x - now[:, None])
    if MASKED:
        weights = tl.where(sees, weights, 0.0)
    fading = tl.exp2(highest - now)
    acc = acc * fading[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
    return acc, now, total * fading + tl.sum(weights, 1)


@triton.jit  # type: ignore[untyped-decorator]
def _over_held(  # type: ignore[no-untyped-def]
    q, acc, highest, total, keys, values, key_scales, value_scales, pages, begin, first, end, position, head,
    scale, softcap, window, ring,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, WIDTH_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    KEYS: tl.constexpr, KEY_PLACE: tl.constexpr, VALUE_PLACE: tl.constexpr, SCALE_PLACE: tl.constexpr,
    PAGE: tl.constexpr, CODED: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Over the keys of before from `first` to `end`: whole tiles that all queries see, where it is not MASKED."""
    width, value_width = tl.arange(0, WIDTH_BLOCK), tl.arange(0, VALUE_BLOCK)
    is_width, is_value = width < WIDTH, value_width < VALUE_WIDTH
    for tile_start in range(first, end, KEYS):
        key = tile_start + tl.arange(0, KEYS)
        there = key < end if MASKED else tl.full([KEYS], True, tl.int1)
        if PAGE == 0:
            place = begin + key
        else:
            slot = key % ring
            page = tl.load(pages + slot // PAGE, mask=there, other=0)
            place = page * PAGE + slot % PAGE
        k = tl.load(
            keys + place[None, :] * KEY_PLACE + head * WIDTH + width[:, None],
            mask=there[None, :] & is_width[:, None], other=0,
        )  # fmt: skip
        v = tl.load(
            values + place[:, None] * VALUE_PLACE + head * VALUE_WIDTH + value_width[None, :],
            mask=there[:, None] & is_value[None, :], other=0,
        )  # fmt: skip
        if CODED:
            key_scale = tl.load(key_scales + place * SCALE_PLACE + head, mask=there, other=0.0)
            value_scale = tl.load(value_scales + place * SCALE_PLACE + head, mask=there, other=0.0)
            k = (k.to(tl.float32) * key_scale[None, :]).to(q.dtype)
            v = (v.to(tl.float32) * value_scale[:, None]).to(q.dtype)
        sees = there[None, :] & (key[None, :] <= position[:, None])
        if WINDOWED:
            sees = sees & (key[None, :] > position[:, None] - window)
        acc, highest, total = _scored(q, k, v, sees, scale, softcap, acc, highest, total, CAPPED, MASKED, PRECISION)
    return acc, highest, total


@triton.jit  # type: ignore[untyped-decorator]
def _over_new(  # type: ignore[no-untyped-def]
    q, acc, highest, total, keys, values, key_t, value_t, first, end, mine, scale, softcap, window,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, WIDTH_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    KEYS: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same over the row's own new keys, which begin at `keys`."""
    width, value_width = tl.arange(0, WIDTH_BLOCK), tl.arange(0, VALUE_BLOCK)
    is_width, is_value = width < WIDTH, value_width < VALUE_WIDTH
    for tile_start in range(first, end, KEYS):
        key = tile_start + tl.arange(0, KEYS)
        there = key < end if MASKED else tl.full([KEYS], True, tl.int1)
        k = tl.load(
            keys + key.to(tl.int64)[None, :] * key_t + width[:, None],
            mask=there[None, :] & is_width[:, None], other=0.0,
        )  # fmt: skip
        v = tl.load(
            values + key.to(tl.int64)[:, None] * value_t + value_width[None, :],
            mask=there[:, None] & is_value[None, :], other=0.0,
        )  # fmt: skip
        sees = there[None, :] & (key[None, :] <= mine[:, None])
        if WINDOWED:
            sees = sees & (key[None, :] > mine[:, None] - window)
        acc, highest, total = _scored(q, k, v, sees, scale, softcap, acc, highest, total, CAPPED, MASKED, PRECISION)
    return acc, highest, total


# Numbers that change from forward to forward: no kernel is compiled for their values.
@Launch
@triton.jit(do_not_specialize=["count_rows", "split_keys", "window", "ring"])  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    query, new_keys, new_values, keys, values, key_scales, value_scales, out, parts, part_sums, pages, rows, blocks,
    sinks, scale, softcap, window, ring, count_rows, split_keys,
    query_t, query_h, key_t, key_h, value_t, value_h,
    HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, KEY_PLACE: tl.constexpr, VALUE_PLACE: tl.constexpr, SCALE_PLACE: tl.constexpr,
    PAGE: tl.constexpr, CODED: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr, SUNK: tl.constexpr,
    NEW: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block, head = tl.program_id(0), tl.program_id(1)
    row, offset = tl.load(blocks + 2 * block), tl.load(blocks + 2 * block + 1).to(tl.int32)
    seat, start = tl.load(rows + row), tl.load(rows + count_rows + row).to(tl.int32)
    count, first = tl.load(rows + 2 * count_rows + row).to(tl.int32), tl.load(rows + 3 * count_rows + row)
    at = tl.arange(0, ROWS)
    mine, heads = offset + at // GROUP, head * GROUP + at % GROUP
    inside = (at < QUERIES * GROUP) & (mine < count)
    width, value_width = tl.arange(0, WIDTH_BLOCK), tl.arange(0, VALUE_BLOCK)
    is_width, is_value = width < WIDTH, value_width < VALUE_WIDTH
    q = tl.load(
        query + (first + mine)[:, None] * query_t + heads[:, None] * query_h + width[None, :],
        mask=inside[:, None] & is_width[None, :], other=0.0,
    )  # fmt: skip
    acc = tl.zeros([ROWS, VALUE_BLOCK], tl.float32)
    highest = tl.full([ROWS], _LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if SUNK and not SPLIT:
        highest = tl.load(sinks + heads, mask=inside, other=0.0).to(tl.float32) * _LOG2_E
        total += 1.0
    position = start + mine
    held = start if NEW else start + count  # so many keys lie where those of before do
    low = tl.zeros_like(start)
    if WINDOWED:
        low = tl.maximum(start + offset - window + 1, 0)
    end = held
    if SPLIT:
        low += tl.program_id(2) * split_keys
        end = tl.minimum(held, low + split_keys)
    begin = tl.load(pages + row) if PAGE == 0 else 0
    own_pages = pages if PAGE == 0 else pages + seat * (ring // PAGE)
    # Tiles that all queries see come first, without masks; with a window, none does.
    seen = low if WINDOWED else low + tl.maximum(end - low, 0) // KEYS * KEYS
    for masked in tl.static_range(2):
        acc, highest, total = _over_held(
            q, acc, highest, total, keys, values, key_scales, value_scales, own_pages, begin,
            seen if masked else low, end if masked else seen, position, head, scale, softcap, window, ring,
            WIDTH, VALUE_WIDTH, WIDTH_BLOCK, VALUE_BLOCK, KEYS, KEY_PLACE, VALUE_PLACE, SCALE_PLACE, PAGE, CODED,
            CAPPED, WINDOWED, masked == 1, PRECISION,
        )  # fmt: skip
    if NEW:
        last = tl.minimum(count, offset + QUERIES)
        if SPLIT:  # one program takes them
            last = tl.where(tl.program_id(2) == 0, last, 0)
        from_here = tl.maximum(low - start, 0) // KEYS * KEYS
        seen = from_here if WINDOWED else tl.minimum((offset + 1) // KEYS * KEYS, last)
        own_keys, own_values = new_keys + first * key_t + head * key_h, new_values + first * value_t + head * value_h
        for masked in tl.static_range(2):
            acc, highest, total = _over_new(
                q, acc, highest, total, own_keys, own_values, key_t, value_t,
                seen if masked else from_here, last if masked else seen, mine, scale, softcap, window,
                WIDTH, VALUE_WIDTH, WIDTH_BLOCK, VALUE_BLOCK, KEYS, CAPPED, WINDOWED, masked == 1, PRECISION,
            )  # fmt: skip
    if SPLIT:
        part = (block * HEADS + head) * tl.num_programs(2) + tl.program_id(2)
        into = (part * GROUP + at).to(tl.int64)
        partly = parts + into[:, None] * VALUE_WIDTH + value_width[None, :]
        tl.store(partly, acc, mask=inside[:, None] & is_value[None, :])
        tl.store(part_sums + into * 2, highest, mask=inside)
        tl.store(part_sums + into * 2 + 1, total, mask=inside)
    else:
        into = (first + mine)[:, None] * (HEADS * GROUP * VALUE_WIDTH) + heads[:, None] * VALUE_WIDTH
        found = (acc / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + into + value_width[None, :], found, mask=inside[:, None] & is_value[None, :])


@Launch
@triton.jit(do_not_specialize=["count_rows", "splits"])  # type: ignore[untyped-decorator]
def _combine(  # type: ignore[no-untyped-def]
    parts, part_sums, out, rows, blocks, sinks, count_rows, splits,
    HEADS: tl.constexpr, GROUP: tl.constexpr, VALUE_WIDTH: tl.constexpr, VALUE_BLOCK: tl.constexpr, SUNK: tl.constexpr,
):  # fmt: skip
    """Combine what the programs that share a block's keys have found, for one of its heads."""
    block, head, member = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.load(blocks + 2 * block)
    first = tl.load(rows + 3 * count_rows + row)
    width = tl.arange(0, VALUE_BLOCK)
    acc = tl.zeros([VALUE_BLOCK], tl.float32)
    highest = tl.full([1], _LOWEST, tl.float32)
    total = tl.zeros([1], tl.float32)
    if SUNK:
        highest = tl.load(sinks + head * GROUP + member + tl.zeros([1], tl.int32)).to(tl.float32) * _LOG2_E
        total += 1.0
    for split in range(splits):
        at = (((block * HEADS + head) * splits + split) * GROUP + member).to(tl.int64)
        theirs, their_total = tl.load(part_sums + at * 2), tl.load(part_sums + at * 2 + 1)
        now = tl.maximum(highest, theirs)
        part = tl.load(parts + at * VALUE_WIDTH + width, mask=width < VALUE_WIDTH, other=0.0)
        acc = acc * tl.exp2(highest - now) + part * tl.exp2(theirs - now)
        total = total * tl.exp2(highest - now) + their_total * tl.exp2(theirs - now)
        highest = now
    into = first * (HEADS * GROUP * VALUE_WIDTH) + (head * GROUP + member) * VALUE_WIDTH
    tl.store(out + into + width, (acc / total).to(out.dtype.element_ty), mask=width < VALUE_WIDTH)


@triton.jit  # type: ignore[untyped-decorator]
def _copy_runs(  # type: ignore[no-untyped-def]
    source, target, runs, WORDS: tl.constexpr, FETCH: tl.constexpr, BLOCK: tl.constexpr
):
    """A run is a number of records of so many words that lie side by side on either side of the link."""
    run = tl.program_id(0)
    at, place, count = tl.load(runs + 3 * run), tl.load(runs + 3 * run + 1), tl.load(runs + 3 * run + 2)
    if FETCH:
        source, target = source + place * WORDS, target + at * WORDS
    else:
        source, target = source + at * WORDS, target + place * WORDS
    for start in range(tl.program_id(1) * BLOCK, count.to(tl.int32) * WORDS, tl.num_programs(1) * BLOCK):
        word = start + tl.arange(0, BLOCK)
        there = word < count * WORDS
        tl.store(target + word, tl.load(source + word, mask=there), mask=there)


def copy_runs(source: torch.Tensor, target: torch.Tensor, runs: torch.Tensor, *, fetch: bool) -> None:
    """Copy records (uint8: records, bytes) between host memory that the GPU sees and its own, on the current stream.

    runs: (runs, 3), int64: where each begins on the GPU and in host memory, and its records.
    """
    shares = max(1, _COPYING_PROGRAMS // runs.shape[0])
    words = source.shape[1] // 8
    _copy_runs[(runs.shape[0], shares)](
        source.view(torch.int64), target.view(torch.int64), runs, WORDS=words, FETCH=fetch, BLOCK=2048, num_warps=8
    )


@dataclass(frozen=True, slots=True)
class _Tiles:
    """The tile sizes with which a block of queries is worked on."""

    rows: int
    """Of the product: queries times the heads that share keys."""
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class _Share:
    """The launches for the steps of a forward, or for all else in it, in each layer of a kind."""

    blocks: torch.Tensor
    grid: tuple[int, int, int]
    attend: BoundLaunch
    numbers: tuple[Any, ...]
    combine: BoundLaunch | None
    """Combines what programs have found that share the keys of a block, where any do."""
    parts: int
    """Numbers that these leave."""
    sums: int
    """Where their sums begin among them."""


@dataclass(frozen=True, slots=True)
class _Work:
    """What is launched in each layer of a kind in a forward."""

    write: BoundLaunch
    shares: tuple[_Share, ...]


def attend_on_gpu(
    layer: PackedLayer, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scores: Scores
) -> torch.Tensor:
    """An `AttentionKernel` on the current stream, which does not wait for the GPU."""
    view = layer.view
    query, keys, values = (each if each.stride(2) == 1 else each.contiguous() for each in (query, keys, values))
    held_keys, held_values, *scales = layer.memory
    shapes = query.shape[0], query.shape[2], keys.shape[0], values.shape[2], query.dtype, query.device
    kind = (*shapes, *[each.stride(0) for each in layer.memory], scores.scale, scores.softcap, scores.sinks is None)
    work = view.work.get(kind)
    if work is None:
        work = view.work[kind] = _work(layer, query, keys, values, scores)
    out = layer.result(query, values)
    if view.has_new:
        _write_all(layer, work, keys, values)
    sinks = out if scores.sinks is None else scores.sinks
    rows, where = view.tokens.rows, view.where
    strides = [each.stride(dim) for each in (query, keys, values) for dim in (1, 0)]
    for share in work.shares:
        parts = sums = out
        if share.combine is not None:
            parts = query.new_empty(share.parts, dtype=torch.float32)
            sums = parts[share.sums :]
        held = held_keys, held_values, *(scales or (out, out))
        tensors = query, keys, values, *held, out, parts, sums, where, rows, share.blocks, sinks
        share.attend(share.grid, tensors, (*share.numbers, *strides))
        if share.combine is not None:
            blocks, heads, splits = share.grid
            grid = blocks, heads, query.shape[0] // heads
            share.combine(grid, (parts, sums, out, rows, share.blocks, sinks), (rows.shape[1], splits))
    if view.overwrites:
        _write_all(layer, work, keys, values)
    return out


def _write_all(layer: PackedLayer, work: _Work, keys: torch.Tensor, values: torch.Tensor) -> None:
    key_h, key_t, key_w = keys.stride()
    value_h, value_t, value_w = values.stride()
    places = layer.view.places
    assert places is not None
    tensors = keys, values, *layer.memory[:2], places
    work.write((keys.shape[1],), tensors, (key_t, key_h, key_w, value_t, value_h, value_w))


def _work(layer: PackedLayer, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scores: Scores) -> _Work:
    heads, width, value_width = keys.shape[0], keys.shape[2], values.shape[2]
    write = _write.bind(
        HEADS=heads, WIDTH=width, VALUE_WIDTH=value_width, KEY_BLOCK=_power_of_two(heads * width),
        VALUE_BLOCK=_power_of_two(heads * value_width),
    )  # fmt: skip
    group, shares = query.shape[0] // heads, list[_Share]()
    widths = _power_of_two(query.shape[2]), _power_of_two(value_width)
    for steps in (True, False):
        tiles = _tiles(query.device, query.element_size(), widths, group, steps=steps)
        blocks = _blocks(layer.view.tokens, max(1, tiles.rows // group), steps=steps)
        if blocks is not None:
            shares.append(_share(layer, query, keys, values, scores, blocks, tiles, steps=steps))
    return _Work(write, tuple(shares))


def _power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`; Triton's own takes microseconds."""
    return 1 << (number - 1).bit_length()


@cache
def _tiles(device: torch.device, size: int, widths: tuple[int, int], group: int, *, steps: bool) -> _Tiles:
    """Tiles as large as the multiprocessors' shared memory and registers allow, for numbers of `size` bytes and such
    powers of two as widths of keys and values."""
    rows, keys, stages = (16, 128, 2) if steps else (64, 64, 2)  # measured with scripts/bench-attention
    rows = max(rows, _power_of_two(group))
    room = _shared_bytes(device) * 0.8 - rows * widths[0] * size
    while keys > 16 and stages * keys * sum(widths) * size > room:
        keys //= 2
    return _Tiles(rows, keys, 8 if rows > 64 else 4, stages)


@cache
def _shared_bytes(device: torch.device) -> int:
    """Memory that the threads of a program share, in bytes."""
    if device.type != "cuda":  # interpreted
        return 100 << 10
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"])


def _blocks(tokens: Tokens, queries: int, *, steps: bool) -> torch.Tensor | None:
    """(blocks, 2), int64: the row of each block, and its first query among the row's new tokens; None: there is none.

    `steps`: of rows with one new token; else of all others.
    """
    key = queries, steps
    if key not in tokens.blocks:
        chosen = (row for row, count in enumerate(tokens.counts) if (count == 1) == steps)
        pairs = [part for row in chosen for at in range(0, tokens.counts[row], queries) for part in (row, at)]
        tokens.blocks[key] = to_device(pairs, tokens.seats.device).view(-1, 2) if pairs else None
    return tokens.blocks[key]


def _share(
    layer: PackedLayer,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scores: Scores,
    blocks: torch.Tensor,
    tiles: _Tiles,
    *,
    steps: bool,
) -> _Share:
    view, heads, group = layer.view, keys.shape[0], query.shape[0] // keys.shape[0]
    window, width, value_width = view.window, query.shape[2], values.shape[2]
    longest = view.longest_step if steps else 0
    splits = _splits(blocks.shape[0] * heads, longest) if steps else 1
    count = blocks.shape[0] * heads * splits
    shape: dict[str, Any] = {"HEADS": heads, "GROUP": group, "VALUE_WIDTH": value_width}
    shape |= {"VALUE_BLOCK": max(16, _power_of_two(value_width)), "SUNK": scores.sinks is not None}
    held_keys, held_values, *scales = layer.memory
    attend = _attend.bind(
        **shape, WIDTH=width, WIDTH_BLOCK=max(16, _power_of_two(width)), QUERIES=max(1, tiles.rows // group),
        ROWS=tiles.rows, KEYS=tiles.keys, KEY_PLACE=held_keys.stride(0), VALUE_PLACE=held_values.stride(0),
        SCALE_PLACE=scales[0].stride(0) if scales else 0, PAGE=PAGE_TOKENS if view.row_tokens else 0,
        CODED=bool(scales), CAPPED=scores.softcap is not None, WINDOWED=window is not None,
        NEW=not steps or not view.has_new, SPLIT=splits > 1, PRECISION="ieee", num_warps=tiles.warps,
        num_stages=tiles.stages,
    )  # fmt: skip
    split_keys = -(-longest // splits // tiles.keys) * tiles.keys if splits > 1 else 0
    limits = window or 0, view.row_tokens, view.tokens.rows.shape[1], split_keys
    return _Share(
        blocks=blocks,
        grid=(blocks.shape[0], heads, splits),
        attend=attend,
        numbers=(float(scores.scale), scores.softcap or 0.0, *limits),
        combine=_combine.bind(**shape, num_warps=1) if splits > 1 else None,
        parts=parts_elements(query, keys, values, count) if splits > 1 else 0,
        sums=count * group * value_width,
    )


def _splits(programs: int, longest: int) -> int:
    """The number of programs that share the keys of a block."""
    return max(1, min(MOST_PARTS // programs, longest // _SHORTEST_SPLIT))
