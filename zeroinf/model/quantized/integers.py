"""Integer codes: unpacking from words, and conversion to weights with scales and zero points that groups share.

A weight is `(code - zero) * scale`, computed in float32, where it is exact, and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

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
