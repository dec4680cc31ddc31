"""The Triton kernel that expands blocks of GGUF's tensor types; the layouts are described in `ggml`.

What is computed is that of the forms in torch, to the last bit.
"""

# ruff: noqa: N803  constants of a kernel are written large

from __future__ import annotations

import triton
import triton.language as tl

from zeroinf.model.quantized.tile_kernels import (
    byte_of,
    e2m1,
    half_e8m0,
    load_eight,
    load_float,
    load_half,
    load_int,
    load_short,
    load_signed,
    matrix,
    spread,
    tile,
    write,
)


# Triton looks annotations up while it compiles, and knows none of Python's types.
@triton.jit  # type: ignore[untyped-decorator]
def _small_block(at, unit, place, table, inside, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """Blocks of 32 weights; all but Q8_0 have the low bits of the first 16, then those of the others, in one byte."""
    start: tl.constexpr = 1 if KIND == 39 else 4 if KIND == 3 else 6 if KIND == 6 else 8 if KIND == 7 else 2
    aligned: tl.constexpr = 1 if KIND == 39 else 4 if KIND == 3 or KIND == 7 else 2
    if KIND == 8:
        low, high = load_eight(at + 2 + unit * 8, inside, 2)
        return load_half(at, inside) * _signed_byte(low, high, place)
    low, high = load_eight(at + start + unit % 2 * 8, inside, aligned)
    low, high = (low >> (unit // 2 * 4)) & 0x0F0F0F0F, (high >> (unit // 2 * 4)) & 0x0F0F0F0F
    if KIND == 6 or KIND == 7:
        fifth = load_int(at + start - 4 + unit, inside)
        low, high = low | (spread(fifth) << 4), high | (spread(fifth >> 4) << 4)
    code = byte_of(low, high, place)
    if KIND == 39:
        value = half_e8m0(load_int(at, inside)) * (e2m1(code << 28) * 2.0)
    elif KIND == 20:
        value = load_half(at, inside) * load_float(table + code, inside)
    elif KIND == 2 or KIND == 6:
        value = load_half(at, inside) * (code - (8 if KIND == 2 else 16)).to(tl.float32)
    else:
        value = tl.fma(load_half(at, inside), code.to(tl.float32), load_half(at + 2, inside))
    return value


@triton.jit  # type: ignore[untyped-decorator]
def _k_block(at, unit, place, inside, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """Q2_K, Q3_K and Q6_K: 256 weights, of which 16 share a scale; a byte has bits of weights that are 32 apart."""
    half, quarter, first = unit // 16, unit // 4 % 4, unit % 4 * 8
    if KIND == 14:
        low, high = load_eight(at + half * 64 + quarter % 2 * 32 + first, inside, 2)
        low, high = (low >> (quarter // 2 * 4)) & 0x0F0F0F0F, (high >> (quarter // 2 * 4)) & 0x0F0F0F0F
        above, more = load_eight(at + 128 + half * 32 + first, inside, 2)
        low = low | (((above >> (quarter * 2)) & 0x03030303) << 4)
        high = high | (((more >> (quarter * 2)) & 0x03030303) << 4)
        scale = load_half(at + 208, inside) * load_signed(at + 192 + unit // 2, inside)
        return scale * (byte_of(low, high, place) - 32).to(tl.float32)
    start: tl.constexpr = 16 if KIND == 10 else 32
    low, high = load_eight(at + start + half * 32 + first, inside, 4 if KIND == 10 else 2)
    low, high = (low >> (quarter * 2)) & 0x03030303, (high >> (quarter * 2)) & 0x03030303
    if KIND == 10:
        own = load_int(at + unit // 2, inside)
        scale = load_half(at + 80, inside) * (own & 15).to(tl.float32)
        least = load_half(at + 82, inside) * (own >> 4).to(tl.float32)
        return tl.fma(scale, byte_of(low, high, place).to(tl.float32), -least)
    above, more = load_eight(at + first, inside, 2)
    low = low | (((above >> (half * 4 + quarter)) & 0x01010101) << 2)
    high = high | (((more >> (half * 4 + quarter)) & 0x01010101) << 2)
    group = unit // 2
    one = (load_int(at + 96 + group % 8, inside) >> (group // 8 * 4)) & 15
    two = (load_int(at + 104 + group % 4, inside) >> (group // 4 * 2)) & 3
    scale = load_half(at + 108, inside) * ((one | (two << 4)) - 32).to(tl.float32)
    return scale * (byte_of(low, high, place) - 4).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _k_block_with_least(at, unit, place, inside, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """Q4_K and Q5_K: 256 weights, of which 32 share a scale and what is subtracted, of six bits each."""
    group = unit // 4
    low, high = load_eight(at + (48 if KIND == 13 else 16) + unit // 8 * 32 + unit % 4 * 8, inside, 4)
    low, high = (low >> (group % 2 * 4)) & 0x0F0F0F0F, (high >> (group % 2 * 4)) & 0x0F0F0F0F
    if KIND == 13:
        fifth, more = load_eight(at + 16 + unit % 4 * 8, inside, 4)
        low = low | (((fifth >> group) & 0x01010101) << 4)
        high = high | (((more >> group) & 0x01010101) << 4)
    one, two = load_int(at + 4 + group % 4, inside), load_int(at + 8 + group % 4, inside)
    both = load_int(at + 12 + group % 4, inside)
    scale = tl.where(group < 4, one & 63, (both & 15) | ((one >> 2) & 48)).to(tl.float32)
    least = tl.where(group < 4, two & 63, (both >> 4) | ((two >> 2) & 48)).to(tl.float32)
    scale, least = load_half(at, inside) * scale, load_half(at + 2, inside) * least
    return tl.fma(scale, byte_of(low, high, place).to(tl.float32), -least)


@triton.jit
def _short_word(at, inside):  # type: ignore[no-untyped-def]
    """32 bits at an even address."""
    return load_short(at, inside) | (load_short(at + 2, inside) << 16)


@triton.jit
def _even(code):  # type: ignore[no-untyped-def]
    """Seven bits, and one that makes the number of ones even."""
    odd = code ^ (code >> 4)
    odd = odd ^ (odd >> 2)
    return code | (((odd ^ (odd >> 1)) & 1) << 7)


@triton.jit
def _signed(value, signs, place):  # type: ignore[no-untyped-def]
    """The value with its sign changed where the bit of its place is set."""
    bits = value.to(tl.int32, bitcast=True) ^ ((signs << (31 - place)) & -0x80000000)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _signed_byte(low, high, place):  # type: ignore[no-untyped-def]
    """The byte of each place, of two words, with its sign."""
    return ((tl.where(place < 4, low, high) << (24 - place % 4 * 8)) >> 24).to(tl.float32)


@triton.jit
def _points(table, low, high, place, inside):  # type: ignore[no-untyped-def]
    """Eight bytes with signs, of which four are word `low` of the table and four are word `high`."""
    return _signed_byte(load_int(table + low, inside), load_int(table + high, inside), place)


@triton.jit  # type: ignore[untyped-decorator]
def _two_or_three_bits(at, unit, place, table, inside, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """IQ2 and IQ3: codes number points of a grid, of eight or of four weights, whose signs lie apart."""
    group, part = unit // 4, unit % 4
    half = load_half(at, inside)
    if KIND == 16 or KIND == 18:
        word = _short_word(at + (6 + group * 8 if KIND == 16 else 66 + group * 4), inside)
        signs = _even((word >> (part * 7)) & 127)
        scale = half * (0.5 + ((word >> 28) & 15).to(tl.float32)) * (0.25 if KIND == 16 else 0.5)
    elif KIND == 17 or KIND == 22:
        own = (load_int(at + (66 if KIND == 17 else 74) + group, inside) >> (part // 2 * 4)) & 15
        scale = half * (0.5 + own.to(tl.float32)) * 0.25
    else:
        own = (load_int(at + 106 + group // 2, inside) >> (group % 2 * 4)) & 15
        scale = half * (1 + 2 * own).to(tl.float32)
    if KIND == 18 or KIND == 21:
        low, high = load_int(at + 2 + unit * 2, inside), load_int(at + 3 + unit * 2, inside)
        if KIND == 21:
            ninth = load_int(at + 66 + group, inside) >> (part * 2)
            low, high = low | ((ninth & 1) << 8), high | ((ninth & 2) << 7)
            signs = load_int(at + 74 + unit, inside)
    else:
        if KIND == 16:
            index = load_int(at + 2 + group * 8 + part, inside)
        elif KIND == 17:
            code = load_short(at + 2 + unit * 2, inside)
            index, signs = code & 511, _even(code >> 9)
        else:
            index = load_int(at + 2 + unit, inside) | (((load_int(at + 66 + group, inside) >> (part * 2)) & 3) << 8)
            signs = load_int(at + 34 + unit, inside)
        low, high = index * 2, index * 2 + 1
    return _signed(scale * _points(table, low, high, place, inside), signs, place)


@triton.jit  # type: ignore[untyped-decorator]
def _one_bit(at, unit, place, table, inside, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """IQ1: codes number points of a grid, to which an eighth is added or not."""
    group, part = unit // 4, unit % 4
    if KIND == 19:
        own = load_short(at + 34 + group * 2, inside)
        scale = load_half(at, inside) * (2 * ((own >> 12) & 7) + 1).to(tl.float32)
        index = load_int(at + 2 + unit, inside) | (((own >> (part * 3)) & 7) << 8)
        is_less = own >> 15
    else:
        bits = load_short(at + 48, inside) >> 12
        for other in tl.static_range(1, 4):
            bits = bits | ((load_short(at + 48 + other * 2, inside) & 0xF000) >> (12 - 4 * other))
        half = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        own = load_short(at + 48 + unit // 8 * 2, inside) >> (unit // 2 % 4 * 3)
        scale = half * (2 * (own & 7) + 1).to(tl.float32)
        high = (load_int(at + 32 + unit // 2, inside) >> (unit % 2 * 4)) & 15
        index = load_int(at + unit, inside) | ((high & 7) << 8)
        is_less = high >> 3
    delta = tl.where(is_less == 1, -0.125, 0.125)
    return scale * (_points(table, index * 2, index * 2 + 1, place, inside) + delta)


@triton.jit
def _iq4_xs(at, unit, place, table, inside):  # type: ignore[no-untyped-def]
    group = unit // 4
    words = load_eight(at + 8 + group * 16 + unit % 2 * 8, inside, 4)
    code = (byte_of(words[0], words[1], place) >> (unit // 2 % 2 * 4)) & 15
    low = (load_int(at + 4 + group // 2, inside) >> (group % 2 * 4)) & 15
    high = (load_short(at + 2, inside) >> (group * 2)) & 3
    scale = load_half(at, inside) * ((low | (high << 4)) - 32).to(tl.float32)
    return scale * load_float(table + code, inside)


@triton.jit  # type: ignore[untyped-decorator]
def expand_blocks(  # type: ignore[no-untyped-def]
    whole, packed, table, rows, units, stack_stride, row_stride, column_stride,
    KIND: tl.constexpr, WEIGHTS: tl.constexpr, NBYTES: tl.constexpr,
    ROWS: tl.constexpr, UNITS: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """Blocks of the type `KIND`, of `WEIGHTS` weights in `NBYTES` bytes. `table`: int32, its points or values."""
    row, unit, place = tile(ROWS, UNITS, TURNED)
    inside = (row < rows) & (unit < units)
    each: tl.constexpr = WEIGHTS // 8
    at = packed + (matrix() * rows + row) * (units // each) * NBYTES + unit // each * NBYTES
    own = unit % each
    if WEIGHTS == 32:
        value = _small_block(at, own, place, table, inside, KIND)
    elif KIND == 12 or KIND == 13:
        value = _k_block_with_least(at, own, place, inside, KIND)
    elif KIND <= 14:
        value = _k_block(at, own, place, inside, KIND)
    elif KIND == 19 or KIND == 29:
        value = _one_bit(at, own, place, table, inside, KIND)
    elif KIND == 23:
        value = _iq4_xs(at, own, place, table, inside)
    else:
        value = _two_or_three_bits(at, own, place, table, inside, KIND)
    write(whole, value, row, unit, place, stack_stride, row_stride, column_stride, inside)
