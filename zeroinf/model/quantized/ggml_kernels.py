"""The Triton kernel that expands blocks of GGUF's tensor types; the layouts are described in `ggml`.

What is computed is that of the forms in torch, to the last bit.
"""

# ruff: noqa: N803  constants of a kernel are written large

from __future__ import annotations

import triton
import triton.language as tl

from zeroinf.model.quantized.tile_kernels import (
    e2m1,
    e4m3,
    half_e8m0,
    load_eight,
    load_float,
    load_half,
    load_int,
    load_short,
    load_signed,
    matrix,
    tile,
    write,
)


# Triton looks annotations up while it compiles, and knows none of Python's types.
@triton.jit
def _halves(at, inside):  # type: ignore[no-untyped-def]
    """Two float16 at an address that 4 divides."""
    word = load_int(at.to(tl.pointer_type(tl.int32)), inside)
    low, high = word.to(tl.int16).to(tl.float16, bitcast=True), (word >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def _code(low, high, shift, place, mask):  # type: ignore[no-untyped-def]
    """The code of each place in eight bytes, of which all have it `shift` bits up."""
    return (tl.where(place < 4, low, high) >> (place % 4 * 8 + shift)) & mask


@triton.jit  # type: ignore[untyped-decorator]
def _bit(low, high, shift, place, to: tl.constexpr):  # type: ignore[no-untyped-def]
    """Bit `shift` of the byte of each place, as bit `to`."""
    return ((tl.where(place < 4, low, high) >> (place % 4 * 8 + shift)) & 1) << to


@triton.jit  # type: ignore[untyped-decorator]
def _small_block(at, own, place, table, inside, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """Values of the units `own` and `own` + 2 of a block of 32 weights: the low bits of eight bytes, and the high
    ones."""
    if KIND == 8:
        low, high = load_eight(at + 2 + own * 8, inside, 1)
        below, above = load_eight(at + 18 + own * 8, inside, 1)
        scale = load_half(at, inside)
        return scale * _signed_byte(low, high, place), scale * _signed_byte(below, above, place)
    start: tl.constexpr = 1 if KIND == 39 else 4 if KIND == 3 else 6 if KIND == 6 else 8 if KIND == 7 else 2
    aligned: tl.constexpr = 4 if KIND == 3 or KIND == 7 else 1
    low, high = load_eight(at + start + own * 8, inside, aligned)
    one, two = _code(low, high, 0, place, 15), _code(low, high, 4, place, 15)
    if KIND == 6 or KIND == 7:
        one = one | (((load_int(at + start - 4 + own, inside) >> place) & 1) << 4)
        two = two | (((load_int(at + start - 2 + own, inside) >> place) & 1) << 4)
    if KIND == 39:
        scale = half_e8m0(load_int(at, inside))
        return scale * (e2m1(one << 28) * 2.0), scale * (e2m1(two << 28) * 2.0)
    if KIND == 20:
        scale = load_half(at, inside)
        return scale * load_float(table + one, inside), scale * load_float(table + two, inside)
    if KIND == 2 or KIND == 6:
        scale, zero = load_half(at, inside), 8 if KIND == 2 else 16
        return scale * (one - zero).to(tl.float32), scale * (two - zero).to(tl.float32)
    scale, least = _halves(at, inside)
    return tl.fma(scale, one.to(tl.float32), least), tl.fma(scale, two.to(tl.float32), least)


@triton.jit
def _six_bits(at, group, inside):  # type: ignore[no-untyped-def]
    """Scale and what is subtracted of a group of Q4_K or Q5_K."""
    words, shift = (at + 4).to(tl.pointer_type(tl.int32)), group % 4 * 8
    one, two = load_int(words, inside) >> shift, load_int(words + 1, inside) >> shift
    both = load_int(words + 2, inside) >> shift
    scale = tl.where(group < 4, one & 63, (both & 15) | ((one >> 2) & 48))
    least = tl.where(group < 4, two & 63, ((both >> 4) & 15) | ((two >> 2) & 48))
    return scale.to(tl.float32), least.to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _k_block_with_least(at, own, place, inside, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """Q4_K and Q5_K: 256 weights, of which 32 share a scale and what is subtracted, of six bits each. Values of eight
    weights of group 2 (`own` // 4), and of those of the next group that have the same bytes."""
    pair, first = own // 4, own % 4 * 8
    low, high = load_eight(at + (48 if KIND == 13 else 16) + pair * 32 + first, inside, 4)
    one, two = _code(low, high, 0, place, 15), _code(low, high, 4, place, 15)
    if KIND == 13:
        fifth, more = load_eight(at + 16 + first, inside, 4)
        one = one | _bit(fifth, more, pair * 2, place, 4)
        two = two | _bit(fifth, more, pair * 2 + 1, place, 4)
    half, half_least = _halves(at, inside)
    scale, least = _six_bits(at, pair * 2, inside)
    next_scale, next_least = _six_bits(at, pair * 2 + 1, inside)
    return (
        tl.fma(half * scale, one.to(tl.float32), -(half_least * least)),
        tl.fma(half * next_scale, two.to(tl.float32), -(half_least * next_least)),
    )


@triton.jit  # type: ignore[untyped-decorator]
def _k_block(at, own, place, inside, QUARTER: tl.constexpr, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """Q2_K, Q3_K and Q6_K: 256 weights, of which 16 share a scale, and TQ2_0, of which all do; a byte has bits of
    weights that are 32 apart. Values of eight weights of a quarter of half `own` // 4."""
    half, first = own // 4, own % 4 * 8
    group = half * 8 + QUARTER * 2 + own % 4 // 2
    if KIND == 14:
        low, high = load_eight(at + half * 64 + QUARTER % 2 * 32 + first, inside, 1)
        above, more = load_eight(at + 128 + half * 32 + first, inside, 1)
        code = _code(low, high, QUARTER // 2 * 4, place, 15) | (_code(above, more, QUARTER * 2, place, 3) << 4)
        scale = load_half(at + 208, inside) * load_signed(at + 192 + group, inside)
        return scale * (code - 32).to(tl.float32)
    if KIND == 35:
        low, high = load_eight(at + half * 32 + first, inside, 1)
        return load_half(at + 64, inside) * (_code(low, high, QUARTER * 2, place, 3) - 1).to(tl.float32)
    if KIND == 10:
        low, high = load_eight(at + 16 + half * 32 + first, inside, 4)
        own_scale = load_int(at + group, inside)
        scale, least = _halves(at + 80, inside)
        scale, least = scale * (own_scale & 15).to(tl.float32), least * (own_scale >> 4).to(tl.float32)
        return tl.fma(scale, _code(low, high, QUARTER * 2, place, 3).to(tl.float32), -least)
    low, high = load_eight(at + 32 + half * 32 + first, inside, 1)
    above, more = load_eight(at + first, inside, 1)
    code = _code(low, high, QUARTER * 2, place, 3) | _bit(above, more, half * 4 + QUARTER, place, 2)
    one = (load_int(at + 96 + group % 8, inside) >> (half * 4)) & 15
    two = (load_int(at + 104 + group % 4, inside) >> (group // 4 * 2)) & 3
    scale = load_half(at + 108, inside) * ((one | (two << 4)) - 32).to(tl.float32)
    return scale * (code - 4).to(tl.float32)


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
def _point(table, index, place, inside):  # type: ignore[no-untyped-def]
    """The eight bytes with signs of a point of the table, in one load."""
    both = tl.load(table.to(tl.pointer_type(tl.int64)) + index, mask=inside, other=0)
    return _signed_byte(both.to(tl.int32), (both >> 32).to(tl.int32), place)


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
        both = load_short(at + 2 + unit * 2, inside)
        low, high = both & 255, both >> 8
        if KIND == 21:
            ninth = load_int(at + 66 + group, inside) >> (part * 2)
            low, high = low | ((ninth & 1) << 8), high | ((ninth & 2) << 7)
            signs = load_int(at + 74 + unit, inside)
        value = _signed_byte(load_int(table + low, inside), load_int(table + high, inside), place)
    else:
        if KIND == 16:
            index = load_int(at + 2 + group * 8 + part, inside)
        elif KIND == 17:
            code = load_short(at + 2 + unit * 2, inside)
            index, signs = code & 511, _even(code >> 9)
        else:
            index = load_int(at + 2 + unit, inside) | (((load_int(at + 66 + group, inside) >> (part * 2)) & 3) << 8)
            signs = load_int(at + 34 + unit, inside)
        value = _point(table, index, place, inside)
    return _signed(scale * value, signs, place)


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
        low, high = load_eight(at + 48, inside, 4)
        bits = ((low >> 12) & 15) | ((low >> 24) & 240) | ((high >> 4) & 0xF00) | ((high >> 16) & 0xF000)
        half = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        own = tl.where(unit < 16, low, high) >> (unit // 8 % 2 * 16 + unit // 2 % 4 * 3)
        scale = half * (2 * (own & 7) + 1).to(tl.float32)
        high = (load_int(at + 32 + unit // 2, inside) >> (unit % 2 * 4)) & 15
        index = load_int(at + unit, inside) | ((high & 7) << 8)
        is_less = high >> 3
    delta = tl.where(is_less == 1, -0.125, 0.125)
    return scale * (_point(table, index, place, inside) + delta)


@triton.jit
def _iq4_xs(at, own, place, table, inside):  # type: ignore[no-untyped-def]
    """Values of eight weights of group `own` // 2, and of those sixteen further on."""
    group = own // 2
    low, high = load_eight(at + 8 + own * 8, inside, 4)
    four = (load_int(at + 4 + group // 2, inside) >> (group % 2 * 4)) & 15
    two = (load_short(at + 2, inside) >> (group * 2)) & 3
    scale = load_half(at, inside) * ((four | (two << 4)) - 32).to(tl.float32)
    one, other = _code(low, high, 0, place, 15), _code(low, high, 4, place, 15)
    return scale * load_float(table + one, inside), scale * load_float(table + other, inside)


@triton.jit
def _nvfp4(at, own, place, inside):  # type: ignore[no-untyped-def]
    """Values of group `own`, of 16 weights that share a scale: the low bits of eight bytes, and the high ones."""
    low, high = load_eight(at + 4 + own * 8, inside, 4)
    code = load_int(at + own, inside) & 255
    scale = tl.where(code == 127, 0.0, tl.where(code == 255, 240.0, e4m3((code & 127) << 24) * 0.5))
    one, two = _code(low, high, 0, place, 15), _code(low, high, 4, place, 15)
    return scale * (e2m1(one << 28) * 2.0), scale * (e2m1(two << 28) * 2.0)


@triton.jit
def _ternary(at, unit, place, inside):  # type: ignore[no-untyped-def]
    """Values of a unit of TQ1_0: a byte has five digits of base three, of weights that are 32 or 16 apart; or four."""
    in_tail, in_middle = unit >= 30, unit >= 20
    digit = tl.where(in_middle, (unit - 20) // 2, unit // 4)
    byte = tl.where(in_middle, 32 + (unit - 20) % 2 * 8, unit % 4 * 8) + place
    digit = tl.where(in_tail, (unit - 30) * 2 + place // 4, digit)
    byte = tl.where(in_tail, 48 + place % 4, byte)
    power = tl.where(digit == 0, 1, tl.where(digit == 1, 3, tl.where(digit == 2, 9, tl.where(digit == 3, 27, 81))))
    found = (load_int(at + byte, inside) & 255) * power & 255
    return load_half(at + 52, inside) * ((found * 3 >> 8) - 1).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def expand_blocks(  # type: ignore[no-untyped-def]
    whole, packed, table, rows, units, stack_stride, row_stride, column_stride,
    KIND: tl.constexpr, WEIGHTS: tl.constexpr, NBYTES: tl.constexpr, FOLD: tl.constexpr,
    ROWS: tl.constexpr, UNITS: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """Blocks of the type `KIND`, of `WEIGHTS` weights in `NBYTES` bytes. `table`: int32, its points or values.

    A thread has the `FOLD` units whose codes share bytes; `units` counts such groups of a row.
    """
    row, unit, place = tile(ROWS, UNITS, TURNED)
    inside = (row < rows) & (unit < units)
    each: tl.constexpr = WEIGHTS // 8 // FOLD
    block, own = unit // each, unit % each
    at = packed + (matrix() * rows + row) * (units // each) * NBYTES + block * NBYTES
    first = block * (WEIGHTS // 8)
    if FOLD == 4:
        first += own // 4 * 16 + own % 4
        one, two = _k_block(at, own, place, inside, 0, KIND), _k_block(at, own, place, inside, 1, KIND)
        three, four = _k_block(at, own, place, inside, 2, KIND), _k_block(at, own, place, inside, 3, KIND)
        write(whole, one, row, first, place, stack_stride, row_stride, column_stride, inside)
        write(whole, two, row, first + 4, place, stack_stride, row_stride, column_stride, inside)
        write(whole, three, row, first + 8, place, stack_stride, row_stride, column_stride, inside)
        write(whole, four, row, first + 12, place, stack_stride, row_stride, column_stride, inside)
    elif FOLD == 2:
        if WEIGHTS == 32:
            one, two = _small_block(at, own, place, table, inside, KIND)
            first += own
        elif KIND == 23:
            one, two = _iq4_xs(at, own, place, table, inside)
            first += own // 2 * 4 + own % 2
        elif KIND == 40:
            one, two = _nvfp4(at, own, place, inside)
            first += own * 2
        else:
            one, two = _k_block_with_least(at, own, place, inside, KIND)
            first += own // 4 * 8 + own % 4
        further: tl.constexpr = 1 if KIND == 40 else 2 if WEIGHTS == 32 or KIND == 23 else 4
        write(whole, one, row, first, place, stack_stride, row_stride, column_stride, inside)
        write(whole, two, row, first + further, place, stack_stride, row_stride, column_stride, inside)
    else:
        if KIND == 8:
            low, high = load_eight(at + 2 + own * 8, inside, 1)
            value = load_half(at, inside) * _signed_byte(low, high, place)
        elif KIND == 34:
            value = _ternary(at, own, place, inside)
        elif KIND == 19 or KIND == 29:
            value = _one_bit(at, own, place, table, inside, KIND)
        else:
            value = _two_or_three_bits(at, own, place, table, inside, KIND)
        write(whole, value, row, unit, place, stack_stride, row_stride, column_stride, inside)
