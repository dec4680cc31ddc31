"""Checkpoints of torchao in safetensors: its tensor classes are stored as the tensors that they consist of.

Layouts are those of `torchao.quantization.quantize_.workflows` (0.14 to 0.18): Int8Tensor, IntxUnpackedToInt8Tensor,
Float8Tensor, Int4Tensor (MSLK's codes around zero, two a byte, the first in the low bits) and Int4TilePackedTo4dTensor
(tinygemm's tiles of 8 rows, as the kernels of tensor cores read them). What a layer has stored tells which. Activations
stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import ceil
from typing import Any

import torch

from zeroinf.compat import quantizers
from zeroinf.compat.models import modules_in_float32
from zeroinf.model.quantized.expansion import Held, refused
from zeroinf.model.quantized.fused import Random, fused, random_scales, random_words
from zeroinf.model.quantized.integers import affine, by_slices, expand_integers
from zeroinf.model.quantized.linears import STORED, MatrixFormat, Stored, hold_linears
from zeroinf.model.quantized.scaled import expand_scaled

_CODES, _SCALES, _ZEROS, _PAIRS = "_weight_qdata", "_weight_scale", "_weight_zero_point", "_weight_scale_and_zero"
_OF_ACTIVATIONS = ("_weight_act_quant_scale", "_weight_act_quant_zero_point")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# A tile of tinygemm has 8 rows and so many times 16 columns.
_TILE_ROWS, _TILE_COLUMNS, _INNER_TILES = 8, 16, 8
# torchao fills up columns for tinygemm to a multiple.
_TILED_COLUMNS = 1024


def hold_torchao(model: Any, found: Mapping[str, Any]) -> None:
    """Let linear layers hold codes and scales."""
    kept = quantizers.kept_modules(model, found.get("modules_to_not_convert"), list(modules_in_float32(model)[1]))
    usual = _Usual("int8", None)
    if STORED not in found:
        said = (found.get("quant_type") or {}).get("default") if isinstance(found.get("quant_type"), dict) else None
        known = _usual(said or {})
        if known is None:
            raise refused(model, "torchao", f"what {said or found.get('quant_type')} stores is not known without files")
        usual = known
    form = _TorchAo(usual)
    hold_linears(model, found, "torchao", form, _CODES, lambda name: not quantizers.is_quantized(name, kept))


@dataclass(frozen=True, slots=True)
class _Usual:
    """Describes what a config lets expect: codes of a kind, with scales for groups of columns, or for rows."""

    kind: str
    group: int | None


def _usual(said: Mapping[str, Any]) -> _Usual | None:
    """The tensors of a config `said` of torchao; None where they are not known."""
    name, fields = str(said.get("_type")), said.get("_data") or {}
    granularity = fields.get("granularity") or {}
    group = fields.get("group_size") or (granularity.get("_data") or {}).get("group_size")
    if name.startswith("Int4WeightOnly"):
        packing = str((fields.get("int4_packing_format") or {}).get("_data", "PLAIN")).lower()
        kinds = {"plain": "int4", "tile_packed_to_4d": "tiles"}
        return _Usual(kinds[packing], group or 128) if packing in kinds else None
    if granularity.get("_type") in (None, "PerRow", "PerAxis", "PerGroup"):
        if name.startswith(("Int8WeightOnly", "Int8DynamicActivationInt", "IntxWeightOnly")):
            return _Usual("int8", group)
        if name.startswith(("Float8WeightOnly", "Float8DynamicActivationFloat8")):
            return _Usual("float8", None)
    return None


@dataclass(frozen=True, slots=True)
class _TorchAo(MatrixFormat):
    """A weight (rows, columns) in any of the layouts above."""

    expected: _Usual

    def usual(self, rows: int, columns: int) -> dict[str, Stored]:
        kind, group = self.expected.kind, self.expected.group or columns
        groups = ceil(columns / group)
        if kind == "int4":
            scale = Stored(torch.bfloat16, (groups, rows))
            return {_CODES: Stored(torch.uint8, (rows, columns // 2)), _SCALES: scale, _ZEROS: scale}
        if kind == "tiles":
            columns = ceil(columns / _TILED_COLUMNS) * _TILED_COLUMNS
            tiles = (ceil(rows / _TILE_ROWS), columns // (_TILE_COLUMNS * _INNER_TILES), 32, _INNER_TILES // 2)
            pairs = (columns // group, tiles[0] * _TILE_ROWS, 2)
            return {_CODES: Stored(torch.int32, tiles), _PAIRS: Stored(torch.bfloat16, pairs)}
        codes = torch.int8 if kind == "int8" else torch.float8_e4m3fn
        found = {_CODES: Stored(codes, (rows, columns)), _SCALES: Stored(torch.float32, (rows, groups))}
        return found | ({_ZEROS: Stored(torch.int8, (rows, groups))} if kind == "int8" else {})

    def why_not(self, rows: int, columns: int, stored: Mapping[str, Stored]) -> str | None:
        parts = {name: one for name, one in stored.items() if self.is_needed(name)}
        if unknown := set(parts) - {_CODES, _SCALES, _ZEROS, _PAIRS}:
            return f"has {', '.join(sorted(unknown))}, which is not known"
        codes, shapes = parts[_CODES], {name: one.shape for name, one in parts.items()}
        if any(parts[name].dtype not in _FLOATS for name in parts if name in (_SCALES, _PAIRS)):
            return f"has scales of {parts.get(_SCALES, codes).dtype}"
        if _PAIRS in parts:
            return _why_not_tiles(rows, columns, codes, shapes[_PAIRS])
        scales = shapes.get(_SCALES, ())
        if codes == Stored(torch.uint8, (rows, columns // 2)):
            zeros = parts.get(_ZEROS)
            is_known = len(scales) == 2 and scales[1] == rows and columns % scales[0] == 0 and columns % 2 == 0
            is_like = zeros is not None and zeros.shape == scales and zeros.dtype in _FLOATS
            return None if is_known and is_like else f"has {_describe(parts)}"
        is_known = codes in (Stored(torch.int8, (rows, columns)), Stored(torch.float8_e4m3fn, (rows, columns)))
        is_known &= len(scales) == 2 and all(scales) and rows % scales[0] == 0 and columns % scales[1] == 0
        zeros = parts.get(_ZEROS)
        is_known &= zeros is None or (zeros == Stored(torch.int8, scales) and codes.dtype == torch.int8)
        return None if is_known else f"has {_describe(parts)}"

    def is_needed(self, name: str) -> bool:
        return name not in ("bias", *_OF_ACTIVATIONS)

    def expand(self, held: Held, whole: torch.Tensor) -> None:
        codes = held[_CODES]
        if _PAIRS in held:
            pairs = held[_PAIRS]
            padded = codes.shape[-3] * codes.shape[-1] * 2 * _TILE_COLUMNS
            is_usual = whole.shape[-1] % 32 == 0 and padded % (32 * pairs.shape[-3]) == 0
            (_expand_tiles_fused if is_usual else _expand_tiles)(whole, codes, pairs)
        elif codes.dtype == torch.uint8:
            expand_integers(whole, codes, held[_SCALES].mT, held[_ZEROS].mT)
        else:
            expand_scaled(whole, codes, held[_SCALES], held.get(_ZEROS))


def _describe(parts: Mapping[str, Stored]) -> str:
    shown = (f"{name} {one.shape} of {str(one.dtype).removeprefix('torch.')}" for name, one in sorted(parts.items()))
    return ", ".join(shown)


def _why_not_tiles(rows: int, columns: int, codes: Stored, pairs: tuple[int, ...]) -> str | None:
    """Why codes in tiles, with `pairs` of scale and zero, are not those of a matrix (rows, columns)."""
    shape = codes.shape
    if codes.dtype != torch.int32 or len(shape) != 4 or shape[2] != 32 or len(pairs) != 3 or pairs[2] != 2:
        return f"has codes of {codes.dtype} in the shape {shape} beside pairs in the shape {pairs}"
    padded = shape[1] * shape[3] * 2 * _TILE_COLUMNS
    if shape[0] * _TILE_ROWS < rows or padded < columns or pairs[1] < rows or padded % pairs[0]:
        return f"has tiles in the shape {shape} for {rows} x {columns} weights"
    return None


def _expand_tiles(whole: torch.Tensor, codes: torch.Tensor, pairs: torch.Tensor) -> None:
    """Codes from 0 to 15 in tiles (rows / 8, columns / (16 * inner), 32, inner / 2), eight a word: those of two tiles
    of 16 columns, of which lane `t` has row t // 4 and columns 2 (t % 4), 2 (t % 4) + 1, and 8 more than these."""

    def weights(stack: slice, rows: slice) -> torch.Tensor:
        first = rows.start or 0
        count = min(rows.stop or whole.shape[-2], whole.shape[-2]) - first
        tiles = slice(first // _TILE_ROWS, ceil((first + count) / _TILE_ROWS))
        words = codes[stack][:, tiles] if codes.dim() > 4 else codes[None, tiles]
        places = torch.stack([(words >> 4 * place) & 15 for place in range(8)], dim=-1)
        # (stack, tiles of rows, tiles of columns, row of 8, pair of columns, pair of tiles, odd, tile, upper half)
        split: Any = places.unflatten(-1, (2, 2, 2)).unflatten(3, (8, 4))  # type: ignore[no-untyped-call]
        # stack, tiles of rows, row, tiles of columns, pair of tiles, tile, upper half, pair of columns, odd
        rows_first = split.permute(0, 1, 3, 2, 5, 7, 8, 4, 6).flatten(3).flatten(1, 2)
        both = (pairs[stack] if pairs.dim() > 3 else pairs[None])[..., first : first + count, :].transpose(1, 2).float()
        own = rows_first[:, :count].unflatten(-1, (both.shape[2], -1))
        full = affine(own, 8, both[..., :1]).add_(both[..., 1:]).flatten(-2)[..., : whole.shape[-1]]
        return full.contiguous()

    by_slices(whole, _TILE_ROWS, weights)


@cache
def _random(dtype: torch.dtype) -> Random:
    def random(stack: int, rows: int, columns: int, generator: torch.Generator) -> tuple[Any, ...]:
        tiles = ceil(rows / _TILE_ROWS), columns // (_TILE_COLUMNS * _INNER_TILES), 32, _INNER_TILES // 2
        pairs = random_scales(generator, dtype, stack, columns // 128, tiles[0] * _TILE_ROWS, 2)
        return random_words(generator, stack, *tiles), pairs

    return random


_expand_tiles_fused = fused(
    "expand_tiles(Tensor(a!) whole, Tensor codes, Tensor pairs) -> ()",
    _expand_tiles,
    lambda whole, codes, pairs: _random(pairs.dtype),
    {"torchao, int4 in tiles": _random(torch.bfloat16)},
)
