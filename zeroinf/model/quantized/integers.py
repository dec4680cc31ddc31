"""Integer codes: unpacking from words, and conversion to weights with scales and zero points that groups share.

A weight is `(code - zero) * scale`, computed in float32, where it is exact, and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch

from zeroinf.model.quantized.fused import (
    Random,
    fills_units,
    fused,
    random_bytes,
    random_groups,
    random_scales,
    random_words,
)

PER_127 = 7.874015718698502e-3
"""By which bitsandbytes divides the greatest weights of rows by 127."""

# Intermediate values of so many weights are alive at a time.
_WEIGHTS_AT_ONCE, _CPU_WEIGHTS_AT_ONCE = 1 << 24, 1 << 20


def unpack(words: torch.Tensor, bits: int, dim: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Codes (uint8) of `words` (int32), which hold 32 / `bits` of them along `dim`, the lowest bits first.

    Of 3 bits, three words hold 32 codes. `order`: which code of a word each place has, where that is not its own.
    """
    words = words.movedim(dim, -1)
    if bits == 3:
        codes = _three_bits(words)
    else:
        places = [(words >> bits * place) & ((1 << bits) - 1) for place in range(32 // bits)]
        if order is not None:
            places = [places[order.index(place)] for place in range(len(order))]
        codes = torch.stack(places, dim=-1).flatten(-2).to(torch.uint8)
    return codes.movedim(-1, dim)


def _three_bits(words: torch.Tensor) -> torch.Tensor:
    wide = words.long() & 0xFFFFFFFF
    first, second, third = wide.reshape(*wide.shape[:-1], -1, 3).unbind(-1)
    low, high = first | (second << 32), (second >> 16) | (third << 16)  # 64 bits from the first on, 48 from bit 48 on
    places = [(low >> 3 * place) & 7 for place in range(16)] + [(high >> 3 * place) & 7 for place in range(16)]
    return torch.stack(places, dim=-1).flatten(-2).to(torch.uint8)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Words (int32) of `codes` (uint8), which they hold along the last dimension, the lowest bits first."""
    places = torch.arange(8, device=codes.device, dtype=torch.uint8)
    flat = ((codes[..., None] >> places[:bits]) & 1).flatten(-2).unflatten(-1, (-1, 8))  # type: ignore[no-untyped-call]
    found: torch.Tensor = (flat << places).sum(-1, dtype=torch.uint8)
    return found.view(torch.int32)


def packed_size(count: int, bits: int) -> int:
    """Words that so many codes take."""
    return count * bits // 32


def slices(whole: torch.Tensor, unit: int) -> Iterator[tuple[slice, slice]]:
    """Parts of `whole` (..., rows, columns) that are expanded one after the other: which of its first dimension, if it
    is a stack, and which rows, a multiple of `unit` each."""
    at_once = _CPU_WEIGHTS_AT_ONCE if whole.device.type == "cpu" else _WEIGHTS_AT_ONCE
    rows, columns = whole.shape[-2:]
    if whole.dim() > 2 and rows * columns <= at_once:
        step = at_once // max(1, rows * columns)
        for start in range(0, whole.shape[0], step):
            yield slice(start, start + step), slice(None)
        return
    step = max(unit, at_once // columns // unit * unit)
    for number in range(whole.shape[0] if whole.dim() > 2 else 1):
        for start in range(0, rows, step):
            yield slice(number, number + 1), slice(start, start + step)


def by_slices(whole: torch.Tensor, unit: int, weights: Callable[[slice, slice], torch.Tensor]) -> None:
    """Fill `whole` with what `weights` returns for each of its `slices`, of which the first is of a stack."""
    for stack, rows in slices(whole, unit):
        into = whole[stack, rows] if whole.dim() > 2 else whole[rows]
        into.copy_(weights(stack, rows).view(into.shape))


def affine(codes: torch.Tensor, zeros: torch.Tensor | float, scales: torch.Tensor) -> torch.Tensor:
    """Weights in float32: `codes` (..., groups, of a group), `zeros` and `scales` (..., groups, 1) or broadcast."""
    return codes.float().sub_(zeros).mul_(scales.float())


def expand_integers(
    whole: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None = None,
    order: torch.Tensor | None = None,
    factor: float = 1.0,
) -> None:
    """Fill `whole` (..., rows, columns) with `(codes - zeros) * scales * factor`, by a kernel if it takes such groups.

    `codes`: int8; pairs with signs (uint8, the first in the low bits); or words (int32) of codes of a row, above zero.
    `scales`: (..., blocks of rows, groups). `zeros`: int8 like `scales`; words (..., rows in words, groups); or numbers
    like `scales`, which are added to the products. `order` (..., columns): the group of each column; where it is given,
    scales and zero points of a group are to lie side by side, as far as speed matters.
    """
    down, across = scales.shape[-2:]
    known = codes.dtype != torch.int32 or code_bits(codes.shape, whole.shape[-1]) in (2, 3, 4, 8)
    is_usual = known and down in (1, whole.shape[-2]) and fills_units(whole.shape[-1], across)
    (_expand_fused if is_usual else _expand)(whole, codes, scales, zeros, order, factor)


def code_bits(shape: Sequence[int], columns: int) -> int:
    """The width of codes of which so many lie in the words of a row."""
    return shape[-1] * 32 // columns


def _expand(
    whole: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    order: torch.Tensor | None,
    factor: float,
) -> None:
    rows, columns = whole.shape[-2:]
    stacked, scales = whole.dim() > 2, scales.float()
    is_added = zeros is not None and zeros.is_floating_point()
    if zeros is not None and zeros.dtype == torch.int32:
        bits = code_bits(codes.shape, columns)
        zeros = unpack(zeros, bits, -2)[..., :rows, :].float() - (1 << (bits - 1))

    def of_each(values: torch.Tensor, stack: slice, some: slice) -> torch.Tensor:
        return _spread(_some_rows(values[stack] if stacked else values, some, rows), columns, order, stack)

    def weights(stack: slice, some: slice) -> torch.Tensor:
        values = _numbers(codes[stack, some] if stacked else codes[some], columns)
        if zeros is not None and not is_added:
            values = values.sub_(of_each(zeros, stack, some))
        values = values.mul_(of_each(scales, stack, some))
        if zeros is not None and is_added:
            values = values.add_(of_each(zeros, stack, some))
        return values if factor == 1 else values.mul_(factor)

    by_slices(whole, 32, weights)


def _numbers(codes: torch.Tensor, columns: int) -> torch.Tensor:
    """Codes as float32, around zero."""
    if codes.dtype == torch.int32:
        bits = code_bits(codes.shape, columns)
        return unpack(codes, bits, -1)[..., :columns].float().sub_(1 << (bits - 1))
    if codes.dtype == torch.uint8:
        signed = codes.view(torch.int8)
        return torch.stack(((signed << 4) >> 4, signed >> 4), dim=-1).flatten(-2).float()
    return codes.float()


def _some_rows(values: torch.Tensor, some: slice, rows: int) -> torch.Tensor:
    """The values of `some` of `rows` rows, where a value may belong to several of them."""
    if values.shape[-2] == 1:
        return values
    return values.repeat_interleave(rows // values.shape[-2], dim=-2)[..., some, :]


def _spread(values: torch.Tensor, columns: int, order: torch.Tensor | None, stack: slice) -> torch.Tensor:
    """A value for each column, of groups that lie side by side or are told by `order`; or one for all."""
    if values.shape[-1] == 1:
        return values
    if order is None:
        return values.repeat_interleave(columns // values.shape[-1], dim=-1)
    index = (order[stack] if order.dim() > 1 else order).long()
    return values.gather(-1, index[..., None, :].expand(*values.shape[:-1], columns))


@cache
def _random(
    codes: torch.dtype,
    bits: int,
    zeros: str = "none",
    is_ordered: bool = False,
    is_down: bool = True,
    is_grouped: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    factor: float = 1.0,
    are_across: bool = False,
) -> Random:
    """`are_across`: scales of a group lie side by side."""

    def random(stack: int, rows: int, columns: int, generator: torch.Generator) -> tuple[Any, ...]:
        groups, down = columns // 128 if is_grouped else 1, rows if is_down else 1
        scales = random_scales(generator, dtype, stack, down, groups)
        if are_across:
            scales = scales.mT.contiguous().mT
        own = {
            "none": None,
            "words": random_words(generator, stack, packed_size(rows, bits), groups),
            "words of groups": random_words(generator, stack, groups, packed_size(rows, bits)).mT,
            "bytes": random_bytes(generator, stack, down, groups).view(torch.int8),
            "added": random_scales(generator, dtype, stack, groups, down).mT,
        }[zeros]
        order = random_groups(generator, groups, stack, columns)
        packed = random_words(generator, stack, rows, packed_size(columns, bits)).view(codes)
        return packed, scales, own, order if is_ordered else None, factor

    return random


def _like(
    whole: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    order: torch.Tensor | None,
    factor: float,
) -> Random:
    kinds = {None: "none", torch.int32: "words", torch.int8: "bytes"}
    kind = kinds.get(None if zeros is None else zeros.dtype, "added")
    bits = codes.shape[-1] * codes.itemsize * 8 // whole.shape[-1]
    down, across = scales.shape[-2:]
    are_across = order is not None and scales.stride(-2) == 1
    kind = "words of groups" if kind == "words" and are_across else kind
    return _random(codes.dtype, bits, kind, order is not None, down > 1, across > 1, scales.dtype, factor, are_across)


_expand_fused = fused(
    "expand_integers(Tensor(a!) whole, Tensor codes, Tensor scales, Tensor? zeros, Tensor? order, float factor) -> ()",
    _expand,
    _like,
    {
        "compressed-tensors, int4 in groups": _random(torch.int32, 4),
        "compressed-tensors, int4 with zero points": _random(torch.int32, 4, "words"),
        "compressed-tensors, int4 with actorder": _random(torch.int32, 4, is_ordered=True),
        "compressed-tensors, int4, a scale a row": _random(torch.int32, 4, is_grouped=False),
        "compressed-tensors, int2 in groups": _random(torch.int32, 2),
        "GPTQ, 2 bits": _random(torch.int32, 2, "words", dtype=torch.float16),
        "GPTQ, 3 bits": _random(torch.int32, 3, "words", dtype=torch.float16),
        "GPTQ, 4 bits": _random(torch.int32, 4, "words", dtype=torch.float16),
        "GPTQ, 8 bits": _random(torch.int32, 8, "words", dtype=torch.float16),
        "GPTQ, 4 bits, desc_act": _random(
            torch.int32, 4, "words of groups", is_ordered=True, dtype=torch.float16, are_across=True
        ),
        "compressed-tensors, int8 in words with zero points": _random(torch.int32, 8, "words", is_grouped=False),
        "compressed-tensors, int8 with zero points": _random(torch.int8, 8, "bytes", is_grouped=False),
        "compressed-tensors, int8, one scale": _random(torch.int8, 8, is_down=False, is_grouped=False),
        "bitsandbytes, int8": _random(torch.int8, 8, is_grouped=False, dtype=torch.float32, factor=PER_127),
        "torchao, int4": _random(torch.uint8, 4, "added"),
    },
)
