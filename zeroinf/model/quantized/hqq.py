"""Checkpoints of HQQ: integer codes in groups along rows or columns, with scales and zero points that are numbers.

Layouts are those of `hqq.core` (0.2): a matrix is seen as groups, one a row (axis 1) or one a column (axis 0); codes of
less than eight bits are packed along the first dimension, those of its first part in the highest bits. The shapes of
what a layer has stored tell bits, groups and axis; other things that it has stored say the same once more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import ceil
from typing import Any

import torch

from zeroinf.model.quantized.expansion import Held
from zeroinf.model.quantized.fused import Random, fused, random_bytes, random_scales, random_words
from zeroinf.model.quantized.integers import affine
from zeroinf.model.quantized.linears import MatrixFormat, Stored, hold_linears

_CODES, _SCALES, _ZEROS = "W_q", "scale", "zero"
# What hqq writes beside them: settings, each as a tensor.
_SETTINGS = {
    *("nbits", "group_size", "shape", "axis", "packing", "unpack_view_dtype", "view_as_float", "quant_scale"),
    *("quant_zero", "compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config", "channel_wise"),
    *("optimize", "round_zero"),
}
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Codes in a byte, or of three bits in a word.
_IN_ONE = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}
# So many weights are expanded at a time.
_AT_ONCE = 1 << 22


def hold_hqq(model: Any, found: Mapping[str, Any]) -> None:
    """Let linear layers hold codes, scales and zero points."""
    kept = found.get("skip_modules") or ["lm_head"]
    usual = (found.get("quant_config") or {}).get("weight_quant_params") or {}
    form = _Hqq(int(usual.get("nbits", 4)), usual.get("group_size"), int(usual.get("axis", 1)))
    hold_linears(model, found, "hqq", form, _CODES, lambda name: any(one in name.split(".") for one in kept))


@dataclass(frozen=True, slots=True)
class _View:
    """The matrix of groups that codes are packed from, its first dimension packed."""

    bits: int
    axis: int
    shape: tuple[int, int]


@dataclass(frozen=True, slots=True)
class _Hqq(MatrixFormat):
    bits: int
    group: int | None
    axis: int

    def usual(self, rows: int, columns: int) -> dict[str, Stored]:
        group = self.group or columns
        groups = rows * columns // group
        shape, shared = ((groups, group), (groups, 1)) if self.axis else ((group, groups), (1, groups))
        codes = Stored(torch.int32 if self.bits == 3 else torch.uint8, (ceil(shape[0] / _IN_ONE[self.bits]), shape[1]))
        return {_CODES: codes, _SCALES: Stored(torch.float16, shared), _ZEROS: Stored(torch.float16, shared)}

    def why_not(self, rows: int, columns: int, stored: Mapping[str, Stored]) -> str | None:
        parts = {name: one for name, one in stored.items() if self.is_needed(name)}
        if parts.keys() != {_CODES, _SCALES, _ZEROS}:
            return f"has {', '.join(sorted(parts))}, not codes, scales and zero points as numbers"
        if any(parts[name].dtype not in _FLOATS for name in (_SCALES, _ZEROS)):
            return f"has scales of {parts[_SCALES].dtype} and zero points of {parts[_ZEROS].dtype}"
        shapes = [parts[name].shape for name in (_CODES, _SCALES, _ZEROS)]
        if _view_of(rows * columns, parts[_CODES].dtype, *shapes) is None:
            return f"has codes {shapes[0]} of {parts[_CODES].dtype}, scales {shapes[1]} and zero points {shapes[2]}"
        return None

    def is_needed(self, name: str) -> bool:
        return name != "bias" and name not in _SETTINGS

    def expand(self, held: Held, whole: torch.Tensor) -> None:
        codes, scales, zeros = held[_CODES], held[_SCALES], held[_ZEROS]
        shapes = [tuple(one.shape[-2:]) for one in (codes, scales, zeros)]
        view = _view_of(whole.shape[-2] * whole.shape[-1], codes.dtype, *shapes)
        assert view is not None
        is_usual = view.shape[1] % 8 == 0 and whole.shape[-1] % 8 == 0
        (_expand_fused if is_usual else _expand)(whole, codes, scales, zeros, view.bits, _IN_ONE[view.bits])


def _expand(
    whole: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int, in_one: int
) -> None:
    """Fill `whole` (..., rows, columns), seen as lines, with codes (..., lines / `in_one`, of a line), scales and zero
    points, both (..., lines, 1) or (..., 1, of a line)."""
    count, wide = codes.shape[-2:]
    lines = whole.shape[-2] * whole.shape[-1] // wide
    into = whole.view(*whole.shape[:-2], lines, wide)
    step = max(1, _AT_ONCE // (codes.numel() // count))
    for place in range(in_one):
        shift = bits * (in_one - 1 - place)
        for start in range(0, min(count, lines - place * count), step):
            end = min(start + step, count, lines - place * count)
            own = (codes[..., start:end, :] >> shift) & ((1 << bits) - 1)
            rows = slice(place * count + start, place * count + end)
            some = rows if scales.shape[-1] == 1 else slice(None)
            into[..., rows, :].copy_(affine(own, zeros[..., some, :].float(), scales[..., some, :]))


@cache
def _random(bits: int, is_down: bool, dtype: torch.dtype) -> Random:
    def random(stack: int, rows: int, columns: int, generator: torch.Generator) -> tuple[Any, ...]:
        lines, wide = (rows * columns // 64, 64) if is_down else (64, rows * columns // 64)
        count, shared = ceil(lines / _IN_ONE[bits]), (lines, 1) if is_down else (1, wide)
        codes = random_words if bits == 3 else random_bytes
        scales, zeros = (random_scales(generator, dtype, stack, *shared) for _ in range(2))
        return codes(generator, stack, count, wide), scales, zeros, bits, _IN_ONE[bits]

    return random


_expand_fused = fused(
    "expand_lines(Tensor(a!) whole, Tensor codes, Tensor scales, Tensor zeros, int bits, int in_one) -> ()",
    _expand,
    lambda whole, codes, scales, zeros, bits, in_one: _random(bits, scales.shape[-1] == 1, scales.dtype),
    {
        **{f"HQQ, {bits} bits": _random(bits, True, torch.float16) for bits in _IN_ONE},
        "HQQ, 4 bits along columns": _random(4, False, torch.float16),
    },
)


def _view_of(
    weights: int, dtype: torch.dtype, codes: tuple[int, ...], scales: tuple[int, ...], zeros: tuple[int, ...]
) -> _View | None:
    """The groups of a matrix of so many weights whose tensors have these shapes; None where they are of none."""
    if len(codes) != 2 or len(scales) != 2 or scales != zeros or not all(codes) or weights % codes[1]:
        return None
    first, axis = weights // codes[1], 1 if scales[1] == 1 else 0
    if scales != ((first, 1) if axis else (1, codes[1])):
        return None
    widths = [3] if dtype == torch.int32 else [8, 4, 2, 1] if dtype == torch.uint8 else []
    bits = next((bits for bits in widths if ceil(first / _IN_ONE[bits]) == codes[0]), None)
    exact = bits is not None and (bits == 3 or codes[0] * _IN_ONE[bits] == first)
    return _View(bits, axis, (first, codes[1])) if bits is not None and exact else None
