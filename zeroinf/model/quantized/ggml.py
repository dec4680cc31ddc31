"""The tensor types of GGUF files: the bytes of a block of weights, and their conversion to numbers.

Layouts are those of ggml's `ggml-common.h` and the reference decoders of the package gguf (`gguf.quants`). A weight is
computed in float32, to the same bits as there, and rounded once to the requested dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from zeroinf.model.quantized.fused import Random, fused, random_bytes

_Blocks = torch.Tensor
"""(blocks, bytes of one) uint8."""

# Blocks are decoded some at a time: intermediate values take up to 40 bytes a weight. On the CPU they stay in a cache.
_WEIGHTS_AT_ONCE, _CPU_WEIGHTS_AT_ONCE = 1 << 24, 1 << 18
_IQ4_VALUES = (-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0)
_FP4_VALUES = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 0.0, -1.0, -2.0, -3.0, -4.0, -6.0, -8.0, -12.0)  # doubled
_IQ1_DELTA = 0.125


@dataclass(frozen=True, slots=True)
class GgmlType:
    """A type of quantized blocks: `weights` weights in `nbytes` bytes, decoded to (blocks, weights) float32."""

    name: str
    weights: int
    nbytes: int
    decode: Callable[[_Blocks], torch.Tensor]

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of so many weights, which must fill its blocks."""
        assert columns % self.weights == 0
        return columns // self.weights * self.nbytes


def expand(packed: torch.Tensor, kind: GgmlType, whole: torch.Tensor) -> None:
    """Write the weights that `packed` (..., bytes of a row; uint8) stands for into `whole` (..., columns; strided)."""
    table = _words_of_table(kind.name, packed.device) if kind.name.startswith("IQ") else None
    _expand_fused(whole, packed, _NUMBERS[kind.name], kind.weights, kind.nbytes, table)


def _expand(packed: torch.Tensor, kind: GgmlType, whole: torch.Tensor) -> None:
    at_once = _CPU_WEIGHTS_AT_ONCE if packed.device.type == "cpu" else _WEIGHTS_AT_ONCE
    if whole.dim() > 2 and whole[0].numel() > at_once:
        for own, into in zip(packed, whole, strict=True):
            _expand(own, kind, into)
        return
    step = max(1, at_once // max(1, whole[:1].numel()))
    for start in range(0, whole.shape[0], step):
        into = whole[start : start + step]
        into.copy_(kind.decode(packed[start : start + step].reshape(-1, kind.nbytes)).view(into.shape))


def _half(blocks: _Blocks, at: int) -> torch.Tensor:
    """The float16 at byte `at` of each block, as (blocks, 1) float32."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _signed(codes: torch.Tensor) -> torch.Tensor:
    return codes.contiguous().view(torch.int8).float()


def _fields(codes: torch.Tensor, shifts: tuple[int, ...], mask: int, width: int | None = None) -> torch.Tensor:
    """Fields of bits in ggml's order: of all `width` bytes (default: all) at one shift, then at the next."""
    parts = codes.reshape(codes.shape[0], -1, width or codes.shape[1])
    return torch.stack([(parts >> shift) & mask for shift in shifts], dim=2).flatten(1)


def _each(codes: torch.Tensor, shifts: tuple[int, ...], mask: int) -> torch.Tensor:
    """Fields of bits, all of a byte before the next one's."""
    return torch.stack([(codes >> shift) & mask for shift in shifts], dim=-1).flatten(1)


def _little(codes: torch.Tensor, width: int) -> torch.Tensor:
    """Numbers of `width` bytes, the lowest first, as int64."""
    parts = codes.reshape(codes.shape[0], -1, width).long()
    return sum((parts[..., byte] << 8 * byte for byte in range(1, width)), parts[..., 0])


def _times(scales: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Each of (blocks, n) `scales` times its share of `codes`."""
    return (scales[..., None] * codes.float().view(*scales.shape, -1)).flatten(1)


def _q4_0(blocks: _Blocks) -> torch.Tensor:
    return _half(blocks, 0) * (_fields(blocks[:, 2:], (0, 4), 15).float() - 8)


def _q4_1(blocks: _Blocks) -> torch.Tensor:
    return _half(blocks, 0) * _fields(blocks[:, 4:], (0, 4), 15).float() + _half(blocks, 2)


def _five_bits(blocks: _Blocks, at: int) -> torch.Tensor:
    """32 codes: a bit each in the four bytes at `at`, then four each."""
    high = _each(blocks[:, at : at + 4], tuple(range(8)), 1)
    return _fields(blocks[:, at + 4 :], (0, 4), 15) | (high << 4)


def _q5_0(blocks: _Blocks) -> torch.Tensor:
    return _half(blocks, 0) * (_five_bits(blocks, 2).float() - 16)


def _q5_1(blocks: _Blocks) -> torch.Tensor:
    return _half(blocks, 0) * _five_bits(blocks, 4).float() + _half(blocks, 2)


def _q8_0(blocks: _Blocks) -> torch.Tensor:
    return _half(blocks, 0) * _signed(blocks[:, 2:])


def _q2_k(blocks: _Blocks) -> torch.Tensor:
    scales, codes = blocks[:, :16], _fields(blocks[:, 16:80], (0, 2, 4, 6), 3, 32)
    least = (_half(blocks, 82) * (scales >> 4).float()).repeat_interleave(16, dim=1)
    return _times(_half(blocks, 80) * (scales & 15).float(), codes) - least


def _q3_k(blocks: _Blocks) -> torch.Tensor:
    low, high = blocks[:, 96:104], blocks[:, 104:108]
    scales = (_fields(low, (0, 4), 15) | (_fields(high, (0, 2, 4, 6), 3) << 4)).float() - 32
    above = _fields(blocks[:, :32], tuple(range(8)), 1, 32)
    codes = _fields(blocks[:, 32:96], (0, 2, 4, 6), 3, 32).float() - (1 - above.float()) * 4
    return _times(_half(blocks, 108) * scales, codes)


def _scales_and_least(blocks: _Blocks) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales of the eight groups of Q4_K and Q5_K, and what is subtracted from each: six bits apiece in twelve
    bytes."""
    one, two, both = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat((one & 63, (both & 15) | ((one >> 2) & 48)), dim=1)
    least = torch.cat((two & 63, (both >> 4) | ((two >> 2) & 48)), dim=1)
    return _half(blocks, 0) * scales.float(), _half(blocks, 2) * least.float()


def _q4_k(blocks: _Blocks) -> torch.Tensor:
    scales, least = _scales_and_least(blocks)
    return _times(scales, _fields(blocks[:, 16:], (0, 4), 15, 32)) - least.repeat_interleave(32, dim=1)


def _q5_k(blocks: _Blocks) -> torch.Tensor:
    scales, least = _scales_and_least(blocks)
    high = _fields(blocks[:, 16:48], tuple(range(8)), 1, 32)
    codes = _fields(blocks[:, 48:], (0, 4), 15, 32) | (high << 4)
    return _times(scales, codes) - least.repeat_interleave(32, dim=1)


def _q6_k(blocks: _Blocks) -> torch.Tensor:
    scales = _half(blocks, 208) * _signed(blocks[:, 192:208])
    codes = _fields(blocks[:, :128], (0, 4), 15, 64) | (_fields(blocks[:, 128:192], (0, 2, 4, 6), 3, 32) << 4)
    return _times(scales, codes.float() - 32)


def codes_of_mxfp4(rows: torch.Tensor) -> torch.Tensor:
    """The codes (..., groups, 16) of `rows` (..., bytes; uint8) of MXFP4: two that lie side by side in a byte, where
    ggml has the first half of a group in the lower bits of its bytes."""
    words = _groups_of_mxfp4(rows)[..., 1:].contiguous().view(torch.int64)
    codes = torch.empty((*words.shape[:-1], 16), dtype=torch.uint8)
    for half in (0, 1):
        bits = (words >> 4 * half) & 0x0F0F0F0F0F0F0F0F
        bits |= bits >> 4
        codes[..., 8 * half : 8 * half + 8] = bits.view(torch.uint8)[..., ::2]
    return codes


def powers_of_mxfp4(rows: torch.Tensor) -> torch.Tensor:
    """The powers of two (..., groups) of `rows` (..., bytes; uint8) of MXFP4."""
    return _groups_of_mxfp4(rows)[..., 0]


def _groups_of_mxfp4(rows: torch.Tensor) -> torch.Tensor:
    return rows.view(*rows.shape[:-1], -1, QUANTIZED_TYPES[_NUMBERS["MXFP4"]].nbytes)


def _mxfp4(blocks: _Blocks) -> torch.Tensor:
    power = blocks[:, :1].int()
    bits = torch.where(power < 2, 0x00200000 << power.clamp(max=1), (power - 1) << 23)
    codes = _fields(blocks[:, 1:], (0, 4), 15)
    return bits.view(torch.float32) * _table(_FP4_VALUES, blocks.device)[codes.long()]


def _nvfp4(blocks: _Blocks) -> torch.Tensor:
    codes = blocks[:, :4]
    scales = (codes & 127).view(torch.float8_e4m3fn).float() / 2
    scales = scales.where(codes != 127, 0.0).where(codes != 255, 240.0)  # its last code is no NaN but, with a sign, 480
    values = _table(_FP4_VALUES, blocks.device)[_fields(blocks[:, 4:], (0, 4), 15, 8).long()]
    return _times(scales, values)


def _tq1_0(blocks: _Blocks) -> torch.Tensor:
    """Five digits of base three in a byte, read as a fraction of 256; four in each of the last bytes."""
    parts = ((blocks[:, :32], 5), (blocks[:, 32:48], 5), (blocks[:, 48:52], 4))
    powers = torch.tensor([1, 3, 9, 27, 81], dtype=torch.uint8, device=blocks.device)
    found = torch.cat([(part[:, None] * powers[:count, None]).flatten(1) for part, count in parts], dim=1)
    return _half(blocks, 52) * (((found.short() * 3) >> 8).float() - 1)


def _tq2_0(blocks: _Blocks) -> torch.Tensor:
    return _half(blocks, 64) * (_fields(blocks[:, :64], (0, 2, 4, 6), 3, 32).float() - 1)


def _iq4_nl(blocks: _Blocks) -> torch.Tensor:
    return _half(blocks, 0) * _table(_IQ4_VALUES, blocks.device)[_fields(blocks[:, 2:], (0, 4), 15).long()]


def _iq4_xs(blocks: _Blocks) -> torch.Tensor:
    high = _each(_little(blocks[:, 2:4], 2), tuple(range(0, 16, 2)), 3)
    scales = (_each(blocks[:, 4:8], (0, 4), 15) | (high << 4)).float() - 32
    codes = _fields(blocks[:, 8:], (0, 4), 15, 16).long()
    return _times(_half(blocks, 0) * scales, _table(_IQ4_VALUES, blocks.device)[codes])


def _points(name: str, index: torch.Tensor) -> torch.Tensor:
    """Points of a grid: (blocks, n, width)."""
    return _grid(name, index.device)[index.long()]


def _signs(bits: torch.Tensor) -> torch.Tensor:
    """1 and -1 for the eight bits of each byte: (blocks, n, 8)."""
    bits = torch.stack([(bits >> bit) & 1 for bit in range(8)], dim=-1)
    return 1 - 2 * bits.float()


def _even_signs(index: torch.Tensor) -> torch.Tensor:
    """Signs of an index of seven bits, of which an even number is -1."""
    return _signs(_sign_table(index.device)[index.long()])


def _iq2_xxs(blocks: _Blocks) -> torch.Tensor:
    words = _little(blocks[:, 2:], 4).view(-1, 8, 2)
    scales = _half(blocks, 0) * (0.5 + (words[..., 1] >> 28).float()) * 0.25
    points = _points("IQ2_XXS", _each(words[..., 0], (0, 8, 16, 24), 255))
    return _pointed(scales, points, _even_signs(_each(words[..., 1], (0, 7, 14, 21), 127)))


def _iq2_xs(blocks: _Blocks) -> torch.Tensor:
    codes = _little(blocks[:, 2:66], 2)
    scales = _half(blocks, 0) * (0.5 + _each(blocks[:, 66:], (0, 4), 15).float()) * 0.25
    return _pointed(scales, _points("IQ2_XS", codes & 511), _even_signs(codes >> 9))


def _iq2_s(blocks: _Blocks) -> torch.Tensor:
    scales = _half(blocks, 0) * (0.5 + _each(blocks[:, 74:], (0, 4), 15).float()) * 0.25
    index = blocks[:, 2:34].long() | (_each(blocks[:, 66:74], (0, 2, 4, 6), 3).long() << 8)
    return _pointed(scales, _points("IQ2_S", index), _signs(blocks[:, 34:66]))


def _iq3_xxs(blocks: _Blocks) -> torch.Tensor:
    words = _little(blocks[:, 66:], 4)
    scales = _half(blocks, 0) * (0.5 + (words >> 28).float()) * 0.5
    return _pointed(scales, _points("IQ3_XXS", blocks[:, 2:66]), _even_signs(_each(words, (0, 7, 14, 21), 127)))


def _iq3_s(blocks: _Blocks) -> torch.Tensor:
    scales = _half(blocks, 0) * (1 + 2 * _each(blocks[:, 106:], (0, 4), 15)).float()
    index = blocks[:, 2:66].long() | (_each(blocks[:, 66:74], tuple(range(8)), 1).long() << 8)
    return _pointed(scales, _points("IQ3_S", index), _signs(blocks[:, 74:106]))


def _pointed(scales: torch.Tensor, points: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    return _times(scales, points.flatten(1)) * signs.flatten(1)


def _iq1_s(blocks: _Blocks) -> torch.Tensor:
    high = _little(blocks[:, 34:], 2)
    scales = _half(blocks, 0) * (2 * ((high >> 12) & 7) + 1).float()
    index = blocks[:, 2:34].long() | (_each(high, (0, 3, 6, 9), 7) << 8)
    delta = (1 - 2 * (high >> 15).float()) * _IQ1_DELTA
    return _times(scales, _points("IQ1_S", index).flatten(1) + delta.repeat_interleave(32, dim=1))


def _iq1_m(blocks: _Blocks) -> torch.Tensor:
    words = _little(blocks[:, 48:], 2)
    scale = sum(((words[:, part] & 0xF000) >> 12 - 4 * part for part in range(1, 4)), (words[:, 0] & 0xF000) >> 12)
    half = torch.stack((scale & 255, scale >> 8), dim=-1).to(torch.uint8).view(torch.float16).float()
    scales = half * (2 * _each(words, (0, 3, 6, 9), 7) + 1).float()
    high = _each(blocks[:, 32:48], (0, 4), 15).long()
    index = blocks[:, :32].long() | ((high & 7) << 8)
    delta = (1 - 2 * (high >> 3).float()) * _IQ1_DELTA
    return _times(scales, _points("IQ1_M", index).flatten(1) + delta.repeat_interleave(8, dim=1))


@cache
def _table(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


@cache
def _grid(name: str, device: torch.device) -> torch.Tensor:
    """The points of a type whose codes number them: (points, weights of each). The package gguf has the tables."""
    from gguf import quants

    kind = getattr(quants, name)
    kind.init_grid()
    return torch.tensor(kind.grid, dtype=torch.float32, device=device).view(*kind.grid_shape)


@cache
def _sign_table(device: torch.device) -> torch.Tensor:
    """Seven bits, and one that makes the number of ones even."""
    return torch.tensor([code | (code.bit_count() % 2) << 7 for code in range(128)], dtype=torch.uint8, device=device)


QUANTIZED_TYPES = {
    2: GgmlType("Q4_0", 32, 18, _q4_0),
    3: GgmlType("Q4_1", 32, 20, _q4_1),
    6: GgmlType("Q5_0", 32, 22, _q5_0),
    7: GgmlType("Q5_1", 32, 24, _q5_1),
    8: GgmlType("Q8_0", 32, 34, _q8_0),
    10: GgmlType("Q2_K", 256, 84, _q2_k),
    11: GgmlType("Q3_K", 256, 110, _q3_k),
    12: GgmlType("Q4_K", 256, 144, _q4_k),
    13: GgmlType("Q5_K", 256, 176, _q5_k),
    14: GgmlType("Q6_K", 256, 210, _q6_k),
    16: GgmlType("IQ2_XXS", 256, 66, _iq2_xxs),
    17: GgmlType("IQ2_XS", 256, 74, _iq2_xs),
    18: GgmlType("IQ3_XXS", 256, 98, _iq3_xxs),
    19: GgmlType("IQ1_S", 256, 50, _iq1_s),
    20: GgmlType("IQ4_NL", 32, 18, _iq4_nl),
    21: GgmlType("IQ3_S", 256, 110, _iq3_s),
    22: GgmlType("IQ2_S", 256, 82, _iq2_s),
    23: GgmlType("IQ4_XS", 256, 136, _iq4_xs),
    29: GgmlType("IQ1_M", 256, 56, _iq1_m),
    34: GgmlType("TQ1_0", 256, 54, _tq1_0),
    35: GgmlType("TQ2_0", 256, 66, _tq2_0),
    39: GgmlType("MXFP4", 32, 17, _mxfp4),
    40: GgmlType("NVFP4", 64, 36, _nvfp4),
}
"""By the number that files give them."""

_NUMBERS = {kind.name: number for number, kind in QUANTIZED_TYPES.items()}


@cache
def _words_of_table(name: str, device: torch.device) -> torch.Tensor:
    """The values of a type's codes, or its points of four or eight bytes, as int32 that its kernel reads."""
    if name.startswith("IQ4"):
        return _table(_IQ4_VALUES, device).int()
    points: torch.Tensor = _grid(name, torch.device("cpu")).to(torch.int8).contiguous()
    return points.view(torch.int32).flatten().to(device)


@cache
def _random(kind: int) -> Random:
    own = QUANTIZED_TYPES[kind]

    def random(stack: int, rows: int, columns: int, generator: torch.Generator) -> tuple[Any, ...]:
        packed = random_bytes(generator, stack, rows, own.row_bytes(columns))
        table = _words_of_table(own.name, packed.device) if own.name.startswith("IQ") else None
        return packed, kind, own.weights, own.nbytes, table

    return random


_expand_fused = fused(
    "expand_ggml(Tensor(a!) whole, Tensor packed, int kind, int weights, int nbytes, Tensor? table) -> ()",
    lambda whole, packed, kind, *ignored: _expand(packed, QUANTIZED_TYPES[kind], whole),
    lambda whole, packed, kind, *ignored: _random(kind),
    {f"GGUF {kind.name}": _random(number) for number, kind in QUANTIZED_TYPES.items()},
)
