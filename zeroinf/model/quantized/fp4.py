"""Codes of four bits (E2M1): some share a power of two (MXFP4), or a scale in FP8, and all one in float32 (NVFP4).

A byte holds two codes, the first in its lower bits. Checkpoints of gpt-oss, of compressed-tensors and of ModelOpt have
them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from zeroinf.model.quantized.fused import Random, fused, random_bytes, random_scales
from zeroinf.model.quantized.integers import by_slices

_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def _expand(
    whole: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, of_all: torch.Tensor | None, divides: bool
) -> None:
    stacked = whole.dim() > 2

    def weights(stack: slice, some: slice) -> torch.Tensor:
        own, scale = (packed[stack, some], scales[stack, some]) if stacked else (packed[some], scales[some])
        codes = torch.stack((own & 15, own >> 4), dim=-1).view(-1).int()
        if of_all is None:
            values = _values(whole.dtype, own.device).index_select(0, codes).view(*scale.shape, -1)
            return torch.ldexp(values, scale[..., None].int() - 127, out=values)
        shared = of_all.view(-1, 1, 1)[stack] if stacked else of_all.view(1, 1)
        scale = scale.float() / shared if divides else scale.float() * shared
        return _values(torch.float32, own.device).index_select(0, codes).view(*scale.shape, -1).mul_(scale[..., None])

    by_slices(whole, 1, weights)


@cache
def _values(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.tensor(_VALUES, dtype=dtype, device=device)


@cache
def _random(of_all: str) -> Random:
    def random(stack: int, rows: int, columns: int, generator: torch.Generator) -> tuple[Any, ...]:
        packed = random_bytes(generator, stack, rows, columns // 2)
        if of_all == "none":
            return packed, random_bytes(generator, stack, rows, columns // 32).clamp_(max=254), None, False
        scales = random_bytes(generator, stack, rows, columns // 16).view(torch.float8_e4m3fn)
        return packed, scales, random_scales(generator, torch.float32, stack), of_all == "divides"

    return random


expand_fp4 = fused(
    "expand_fp4(Tensor(a!) whole, Tensor packed, Tensor scales, Tensor? of_all, bool divides) -> ()",
    _expand,
    lambda whole, packed, scales, of_all, divides: _random(
        "none" if of_all is None else "divides" if divides else "times"
    ),
    {
        "MXFP4": _random("none"),
        "NVFP4 of compressed-tensors": _random("divides"),
        "NVFP4 of ModelOpt": _random("times"),
    },
)
"""Fill `whole` (..., rows, columns) with codes `packed` (..., rows, columns / 2; uint8) times `scales`.

Those (..., rows, groups) are exponents of two (uint8) if `of_all` is None; else float8_e4m3fn, times or divided by
`of_all`, a float32 for each matrix."""
