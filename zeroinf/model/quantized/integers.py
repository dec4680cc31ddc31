"""Integer codes: unpacking from words, and conversion to weights with scales and zero points that groups share.

A weight is `(code - zero) * scale`, computed in float32, where it is exact, and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch

from zeroinf.model.quantized.fused import Random, fills_units, fused, random_bytes, random_scales, random_words

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

    `codes`: int8, or words (int32) of codes of a row, above zero. `scales`: (..., blocks of rows, groups). `zeros`:
    int8 like `scales`, or words (..., rows in words, groups). `order` (..., columns): the group of each column.
    """
    down, across = scales.shape[-2:]
    known = codes.dtype == torch.int8 or code_bits(codes.shape, whole.shape[-1]) in (2, 4, 8)
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
    bits = 8 if codes.dtype == torch.int8 else code_bits(codes.shape, columns)
    offset = 1 << (bits - 1)
    if zeros is not None:
        in_words = zeros.dtype == torch.int32
        zeros = unpack(zeros, bits, -2)[..., :rows, :].float() - offset if in_words else zeros.float()

    def weights(stack: slice, some: slice) -> torch.Tensor:
        own = codes[stack, some] if stacked else codes[some]
        scale = _some_rows(scales[stack] if stacked else scales, some, rows)
        values = own.float()
        if own.dtype == torch.int32:
            values = unpack(own, bits, -1)[..., :columns].float().sub_(offset)
        if zeros is not None:
            zero = _some_rows(zeros[stack] if stacked else zeros, some, rows)
            values = values.sub_(_spread(zero, columns, order, stack))
        values = values.mul_(_spread(scale, columns, order, stack))
        return values if factor == 1 else values.mul_(factor)

    by_slices(whole, 32, weights)


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
    bits: int,
    zeros: str = "none",
    is_ordered: bool = False,
    is_down: bool = True,
    is_grouped: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    factor: float = 1.0,
) -> Random:
    """`bits`: the width of codes in words, or 0 for bytes with signs."""

    def random(stack: int, rows: int, columns: int, generator: torch.Generator) -> tuple[Any, ...]:
        groups, width, down = columns // 128 if is_grouped else 1, bits or 8, rows if is_down else 1
        codes = random_words(generator, stack, rows, packed_size(columns, width))
        own = {
            "none": None,
            "words": random_words(generator, stack, packed_size(rows, width), groups),
            "bytes": (random_bytes(generator, stack, down, groups) & 7).view(torch.int8),
        }[zeros]
        order = torch.randint(0, groups, (stack, columns), dtype=torch.int32, generator=generator, device="cpu")
        scales = random_scales(generator, dtype, stack, down, groups)
        return codes if bits else codes.view(torch.int8), scales, own, order if is_ordered else None, factor

    return random


def _like(
    whole: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    order: torch.Tensor | None,
    factor: float,
) -> Random:
    kind = "none" if zeros is None else "words" if zeros.dtype == torch.int32 else "bytes"
    bits = 0 if codes.dtype == torch.int8 else code_bits(codes.shape, whole.shape[-1])
    return _random(bits, kind, order is not None, scales.shape[-2] > 1, scales.shape[-1] > 1, scales.dtype, factor)


_expand_fused = fused(
    "expand_integers(Tensor(a!) whole, Tensor codes, Tensor scales, Tensor? zeros, Tensor? order, float factor) -> ()",
    _expand,
    _like,
    {
        "compressed-tensors, int4 in groups": _random(4),
        "compressed-tensors, int4 with zero points": _random(4, "words"),
        "compressed-tensors, int4 with actorder": _random(4, is_ordered=True),
        "compressed-tensors, int4, a scale a row": _random(4, is_grouped=False),
        "compressed-tensors, int2 in groups": _random(2),
        "compressed-tensors, int8 in words with zero points": _random(8, "words", is_grouped=False),
        "compressed-tensors, int8 with zero points": _random(0, "bytes", is_grouped=False),
        "compressed-tensors, int8, one scale": _random(0, is_down=False, is_grouped=False),
        "bitsandbytes, int8": _random(0, is_grouped=False, dtype=torch.float32, factor=PER_127),
    },
)
