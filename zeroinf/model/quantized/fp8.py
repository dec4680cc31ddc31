"""Checkpoints in FP8 as DeepSeek and others publish them: a scale for each block of a weight, each row, or the
whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import ceil
from typing import Any, TypeVar

import torch

from zeroinf.compat import quantizers
from zeroinf.compat.models import modules_in_float32
from zeroinf.model.quantized.expansion import Held, refused
from zeroinf.model.quantized.expert_codes import MXFP4
from zeroinf.model.quantized.fp4 import expand_fp4
from zeroinf.model.quantized.fused import Random, fused, random_bytes, random_scales
from zeroinf.model.quantized.linears import Coded, MatrixFormat, Stored, hold_linears

_SCALE_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu, torch.uint8)
# Of FP4: two codes a byte, of which so many share a power of two.
_PAIRS, _FP4_GROUP = (torch.int8, torch.uint8), 32
# DeepSeek's checkpoints say "inverse" for what weights are multiplied by. Activations have scales of their own.
_SCALES, _OF_ACTIVATIONS = "weight_scale_inv", ("activation_scale", "input_scale", "qscale_act")
# What others call them: DeepSeek-V4, and Mistral.
_OTHER_NAMES = ("scale", "qscale_weight")


def hold_fp8(model: Any, found: dict[str, Any]) -> None:
    """Let linear layers and experts hold codes and scales. Activations stay as they are."""
    from transformers import FineGrainedFP8Config

    for part, known in (("expert_dtype", ("fp8", "fp4")), ("modules_to_convert", (None,))):
        if found.get(part, known[0]) not in known:
            raise refused(model, f"fp8 with {part} {found[part]}", f"only {part} {known[0]} expands")
    config = FineGrainedFP8Config(**{key: value for key, value in found.items() if key != "stored"})
    kept = quantizers.kept_modules(model, config.modules_to_not_convert, list(modules_in_float32(model)[1]))
    block = tuple(config.weight_block_size) if config.weight_block_size else None
    form = _Fp8(block, experts_in_fp4=found.get("expert_dtype") == "fp4")
    hold_linears(
        model, found, "fp8", form, (_SCALES, *_OTHER_NAMES), lambda name: not quantizers.is_quantized(name, kept)
    )


@dataclass(frozen=True, slots=True)
class _Fp8(MatrixFormat):
    """A weight (rows, columns) of float8_e4m3fn; scales of blocks of `block` rows and columns, of rows, or one.

    Or pairs of FP4 in a byte (int8), of which 32 share a power of two, as the experts of DeepSeek-V4 have them.
    """

    block: tuple[int, int] | None
    experts_in_fp4: bool

    def usual(self, rows: int, columns: int) -> dict[str, Stored]:
        scales = (ceil(rows / self.block[0]), ceil(columns / self.block[1])) if self.block else ()
        return {
            "weight": Stored(torch.float8_e4m3fn, (rows, columns)),
            _SCALES: Stored(torch.float32, scales),
        }

    def usual_expert(self, rows: int, columns: int) -> dict[str, Stored]:
        if not self.experts_in_fp4:
            return self.usual(rows, columns)
        powers = Stored(torch.float8_e8m0fnu, (rows, columns // _FP4_GROUP))
        return {"weight": Stored(torch.int8, (rows, columns // 2)), _SCALES: powers}

    def why_not(self, rows: int, columns: int, stored: Mapping[str, Stored]) -> str | None:
        stored = _named(stored)
        unknown = set(stored) - {"weight", "bias", _SCALES, *_OF_ACTIVATIONS}
        if unknown:
            return f"has {', '.join(sorted(unknown))}, which is not known"
        if "weight" not in stored:
            return "has scales and no weight"
        if stored["weight"].dtype in _PAIRS:
            return _why_not_fp4(rows, columns, stored)
        if stored["weight"] != Stored(torch.float8_e4m3fn, (rows, columns)):
            return f"is not {rows} x {columns} weights of float8_e4m3fn"
        scales = stored[_SCALES]
        possible = [(), (1,), (rows,), (rows, 1)]
        if self.block is not None:
            possible = [(ceil(rows / self.block[0]), ceil(columns / self.block[1]))]
        if scales.shape not in possible or scales.dtype not in _SCALE_TYPES:
            return f"has scales of {scales.dtype} in the shape {scales.shape}"
        return None

    def is_needed(self, name: str) -> bool:
        return name not in ("bias", *_OF_ACTIVATIONS)

    def coded(self, rows: int, columns: int, stored: Mapping[str, Stored]) -> Coded | None:
        scales = next(name for name in stored if name in (_SCALES, *_OTHER_NAMES))
        return Coded(MXFP4, {"blocks": "weight", "scales": scales}) if stored["weight"].dtype in _PAIRS else None

    def expand(self, held: Held, whole: torch.Tensor) -> None:
        scales = _named(held)[_SCALES]
        if held["weight"].dtype in _PAIRS:
            expand_fp4(whole, held["weight"].view(torch.uint8), scales.view(torch.uint8), None, False)
            return
        scales = scales.view(torch.float8_e8m0fnu) if scales.dtype == torch.uint8 else scales
        rows, columns = whole.shape[-2:]
        if self.block is not None:
            height, width = self.block
        else:
            height, width = 1 if scales.numel() > whole[..., 0, 0].numel() else rows, columns
        down = ceil(rows / height)
        expand_fp8(whole, held["weight"], scales.reshape(*whole.shape[:-2], down, -1), height, width)


_Tensor = TypeVar("_Tensor")


def _named(tensors: Mapping[str, _Tensor]) -> dict[str, _Tensor]:
    """`tensors`, with scales by their usual name."""
    return {_SCALES if name in _OTHER_NAMES else name: tensor for name, tensor in tensors.items()}


def _why_not_fp4(rows: int, columns: int, stored: Mapping[str, Stored]) -> str | None:
    if columns % _FP4_GROUP or stored["weight"].shape != (rows, columns // 2):
        return f"is not {rows} x {columns} weights in pairs of FP4"
    scales = stored[_SCALES]
    if scales.shape != (rows, columns // _FP4_GROUP) or scales.dtype not in (torch.float8_e8m0fnu, torch.uint8):
        return f"has FP4 with scales of {scales.dtype} in the shape {scales.shape}"
    return None


def _expand(whole: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, height: int, width: int) -> None:
    """Values that any dtype holds exactly, times float32, rounded once: in place, nothing is written in float32."""
    whole.copy_(codes)
    rows, columns = whole.shape[-2:]
    of_rows = scales.float().repeat_interleave(height, dim=-2)[..., :rows, :]
    full = columns // width
    blocks: torch.Tensor = whole[..., : full * width].unflatten(-1, (full, width))  # type: ignore[no-untyped-call]
    blocks.mul_(of_rows[..., :full, None])
    if columns % width:
        whole[..., full * width :].mul_(of_rows[..., full:])


@cache
def _random(is_down: bool, is_across: bool, height: int, dtype: torch.dtype = torch.float32) -> Random:
    def random(stack: int, rows: int, columns: int, generator: torch.Generator) -> tuple[Any, ...]:
        high, width = height if is_down else rows, 128 if is_across else columns
        blocks = stack, ceil(rows / high), ceil(columns / width)
        if dtype == torch.float8_e8m0fnu:
            scales = random_bytes(generator, *blocks).clamp_(64, 192).view(dtype)
        else:
            scales = random_scales(generator, dtype, *blocks)
        return random_bytes(generator, stack, rows, columns).view(torch.float8_e4m3fn), scales, high, width

    return random


_expand_fused = fused(
    "expand_fp8(Tensor(a!) whole, Tensor codes, Tensor scales, int height, int width) -> ()",
    _expand,
    lambda whole, codes, scales, height, width: _random(
        scales.shape[-2] > 1, scales.shape[-1] > 1, min(height, 64), scales.dtype
    ),
    {
        "FP8, blocks of 128": _random(True, True, 64),
        "FP8, blocks of 128, powers of two": _random(True, True, 64, torch.float8_e8m0fnu),
        "FP8, a scale a row": _random(True, False, 1),
        "FP8, one scale": _random(False, False, 64),
    },
)


def expand_fp8(whole: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, height: int, width: int) -> None:
    """Fill `whole` (..., rows, columns) with codes (float8_e4m3fn) times scales, by a kernel if that takes such blocks.

    `scales` (..., blocks down, blocks across) are numbers, or powers of two (float8_e8m0fnu), of blocks of `height` x
    `width`.
    """
    columns = whole.shape[-1]
    is_usual = columns % 8 == 0 and (width % 8 == 0 or scales.shape[-1] == 1)
    (_expand_fused if is_usual else _expand)(whole, codes, scales, height, width)
