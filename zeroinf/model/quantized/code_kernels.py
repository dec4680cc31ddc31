"""The Triton kernels that expand codes with scales: integers, FP4, FP8 and bitsandbytes' codes of four bits.

What is computed is that of the forms in torch, to the last bit.
"""

# ruff: noqa: N803  constants of a kernel are written large

from __future__ import annotations

import triton
import triton.language as tl

from zeroinf.model.quantized.tile_kernels import (
    byte_of,
    e2m1,
    e4m3,
    half_e8m0,
    joined,
    load_eight,
    load_float,
    load_int,
    matrix,
    tile,
    write,
    write_rows,
)


# Triton looks annotations up while it compiles, and knows none of Python's types.
@triton.jit  # type: ignore[untyped-decorator]
def _unit_codes(at, stride, unit, place, inside, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The eight codes of a unit, out of words that are `stride` apart."""
    word = unit * BITS // 4
    low = load_int(at + word * stride, inside)
    if BITS == 8:
        low = tl.where(place < 4, low, load_int(at + (word + 1) * stride, inside))
        shift = place % 4 * 8
    elif BITS == 4:
        shift = place * 4
    elif BITS == 2:
        low = low >> (unit % 2 * 16)
        shift = place * 2
    else:
        first = unit * 24 % 32
        low = joined(low, load_int(at + (word + 1) * stride, inside & (first > 8)), first)
        shift = place * 3
    return (low >> shift) & ((1 << BITS) - 1)


@triton.jit  # type: ignore[untyped-decorator]
def _code(at, stride, number, inside, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Code `number` out of words that are `stride` apart."""
    word, first = number * BITS // 32, (number * BITS % 32).to(tl.int32)
    low = load_int(at + word * stride, inside)
    if BITS == 3:
        return joined(low, load_int(at + (word + 1) * stride, inside & (first > 29)), first) & 7
    return (low >> first) & ((1 << BITS) - 1)


@triton.jit  # type: ignore[untyped-decorator]
def _codes_of_rows(  # type: ignore[no-untyped-def]
    at, stride, row, rows, BITS: tl.constexpr, ROWS: tl.constexpr, TURNED: tl.constexpr
):
    """The codes of a tile's rows, out of words that are `stride` apart, units and places as `at` has them: a word is
    loaded once for all of its rows."""
    each: tl.constexpr = 32 // BITS
    first = (tl.program_id(0) if TURNED else tl.program_id(1)).to(tl.int64) * (ROWS // each)
    number = first + tl.arange(0, ROWS // each)
    words = number[None, None, :] if TURNED else number[:, None, None]
    word = load_int(at + words * stride, words * each < rows)
    if TURNED:
        wide = tl.broadcast_to(word[:, :, :, None], (word.shape[0], word.shape[1], word.shape[2], each))
        own = tl.reshape(wide, (word.shape[0], word.shape[1], word.shape[2] * each))
    else:
        wide = tl.broadcast_to(word[:, None, :, :], (word.shape[0], each, word.shape[1], word.shape[2]))
        own = tl.reshape(wide, (word.shape[0] * each, word.shape[1], word.shape[2]))
    return (own >> (row % each * BITS).to(tl.int32)) & ((1 << BITS) - 1)


@triton.jit  # type: ignore[untyped-decorator]
def expand_affine(  # type: ignore[no-untyped-def]
    whole, codes, zeros, scales, order, rows, units,
    code_stack, code_row, code_word, zero_stack, zero_row, zero_group, scale_stack, scale_row, scale_group, order_stack,
    stack_stride, row_stride, column_stride,
    BITS: tl.constexpr, GROUP: tl.constexpr, IS_SIGNED: tl.constexpr, ZEROS: tl.constexpr, ZERO: tl.constexpr,
    FACTOR: tl.constexpr, IS_ORDERED: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """`(code - zero) * scale`, times `FACTOR` if that is not 1.

    A group is `GROUP` units, or what `order` tells each column. Zero points are codes, bytes that are
    `ZERO` too low, or `ZERO` for all (`ZEROS`: 2, 1, 0); in the last way, a number may be added (3). Signed codes are
    taken half of their range too high.
    """
    row, unit, place = tile(ROWS, UNITS, TURNED)
    inside = (row < rows) & (unit < units)
    code = _unit_codes(codes + matrix() * code_stack + row * code_row, code_word, unit, place, inside, BITS)
    if IS_SIGNED:
        code = code ^ (1 << (BITS - 1))
    part = unit // GROUP
    if IS_ORDERED:
        part = load_int(order + matrix() * order_stack + unit * 8 + place, unit < units)
    at_zero = zeros + matrix() * zero_stack + part * zero_group
    if ZEROS == 2 and IS_ORDERED and BITS != 3 and ROWS * BITS >= 32:
        zero = _codes_of_rows(at_zero, zero_row, row, rows, BITS, ROWS, TURNED)
    elif ZEROS == 2:
        zero = _code(at_zero, zero_row, row, inside, BITS)
    elif ZEROS == 1:
        zero = load_int(at_zero + row * zero_row, inside) + ZERO
    else:
        zero = ZERO
    scale = load_float(scales + matrix() * scale_stack + row * scale_row + part * scale_group, inside)
    value = (code - zero).to(tl.float32) * scale
    if ZEROS == 3:
        value = value + load_float(at_zero + row * zero_row, inside)
    if FACTOR != 1.0:
        value = value * FACTOR
    if IS_ORDERED and ROWS > 1 and not TURNED:
        write_rows(whole, value, rows, units, stack_stride, row_stride, column_stride)
    else:
        write(whole, value, row, unit, place, stack_stride, row_stride, column_stride, inside)


@triton.jit  # type: ignore[untyped-decorator]
def expand_e2m1(  # type: ignore[no-untyped-def]
    whole, codes, scales, of_all, rows, units, stack_stride, row_stride, column_stride,
    GROUP: tl.constexpr, OF_ALL: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """FP4: words of eight codes. `GROUP` units share a power of two, or a scale in FP8 times (`OF_ALL`: 1), or divided
    by (2), one of the matrix."""
    row, unit, place = tile(ROWS, UNITS, TURNED)
    inside = (row < rows) & (unit < units)
    first = (matrix() * rows + row) * units
    code = e2m1(load_int(codes + first + unit, inside) << (28 - place * 4))
    own = load_int(scales + first // GROUP + unit // GROUP, inside)
    if OF_ALL == 0:
        scale, value = half_e8m0(own), code * 2.0
    else:
        shared = tl.load(of_all + matrix())
        scale, value = e4m3(own << 24), code
        scale = tl.math.div_rn(scale, shared) if OF_ALL == 2 else scale * shared
    write(whole, value * scale, row, unit, place, stack_stride, row_stride, column_stride, inside)


@triton.jit  # type: ignore[untyped-decorator]
def expand_e4m3(  # type: ignore[no-untyped-def]
    whole, codes, scales, rows, units, down, across, stack_stride, row_stride, column_stride,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, POWERS: tl.constexpr,
    ROWS: tl.constexpr, UNITS: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """FP8, in words of four codes: `HEIGHT` rows x `WIDTH` units share a scale, or (`POWERS`) a power of two."""
    row, unit, place = tile(ROWS, UNITS, TURNED)
    inside = (row < rows) & (unit < units)
    words = codes + ((matrix() * rows + row) * units + unit) * 2
    word = tl.where(place < 4, load_int(words, inside), load_int(words + 1, inside))
    at = scales + (matrix() * down + row // HEIGHT) * across + unit // WIDTH
    scale = half_e8m0(load_int(at, inside)) * 2.0 if POWERS else load_float(at, inside)
    write(
        whole,
        e4m3(word << (24 - place % 4 * 8)) * scale,
        row,
        unit,
        place,
        stack_stride,
        row_stride,
        column_stride,
        inside,
    )


@triton.jit  # type: ignore[untyped-decorator]
def expand_table(  # type: ignore[no-untyped-def]
    whole, codes, values, scales, nested, nested_values, offset, rows, units, scale_count, nested_count,
    stack_stride, row_stride, column_stride,
    BLOCK: tl.constexpr, NESTED: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """bitsandbytes: words of eight codes, the first of a byte in its high bits, which number `values`. `BLOCK` units
    share a scale; if `NESTED`, that is a code too, and so many of them share a scale."""
    row, unit, place = tile(ROWS, UNITS, TURNED)
    inside = (row < rows) & (unit < units)
    at = row * units + unit
    word = load_int(codes + matrix() * rows * units + at, inside)
    number = at // BLOCK
    if NESTED == 0:
        scale = load_float(scales + matrix() * scale_count + number, inside)
    else:
        code = load_int(scales + matrix() * scale_count + number, inside)
        shared = load_float(nested + matrix() * nested_count + number // NESTED, inside)
        scale = load_float(nested_values + matrix() * 256 + code, inside) * shared + tl.load(offset + matrix())
    value = load_float(values + matrix() * 16 + ((word >> ((place ^ 1) * 4)) & 15), inside)
    write(whole, value * scale, row, unit, place, stack_stride, row_stride, column_stride, inside)


@triton.jit  # type: ignore[untyped-decorator]
def expand_views(  # type: ignore[no-untyped-def]
    whole, codes, scales, zeros, lines, packed, units, code_stack, scale_stack, stack_stride, row_stride, column_stride,
    BITS: tl.constexpr, FOLD: tl.constexpr, WIDE: tl.constexpr, IS_DOWN: tl.constexpr, IS_FLAT: tl.constexpr,
    UNITS: tl.constexpr,
):  # fmt: skip
    """HQQ: a matrix as `lines` of `WIDE` units, of which `packed` are stored: each has codes of `FOLD` lines, the first
    in the highest bits. A line has a scale and a zero point if `IS_DOWN`, else a column of lines.

    A thread has the units of all lines whose codes share bytes. Rows have `units`; `IS_FLAT`: they follow each other.
    """
    number, place = tl.program_id(0) * UNITS + tl.arange(0, UNITS)[:, None], tl.arange(0, 8)[None, :]
    inside = number < packed * WIDE
    first = number % WIDE * 8 + place
    at = codes + matrix() * code_stack + number.to(tl.int64) * 8
    if BITS == 3:
        word = load_int(at + place, inside)
    else:
        low, high = load_eight(at, inside, 4)
        word = byte_of(low, high, place)
    scales += matrix() * scale_stack
    zeros += matrix() * scale_stack
    if not IS_DOWN:
        zero, scale = load_float(zeros + first, inside), load_float(scales + first, inside)
    for part in tl.static_range(FOLD):
        line = part * packed + number // WIDE
        real = inside & (line < lines)
        if IS_DOWN:
            zero, scale = load_float(zeros + line, real), load_float(scales + line, real)
        code = (word >> ((FOLD - 1 - part) * BITS)) & ((1 << BITS) - 1)
        unit, row = part * packed * WIDE + number, tl.zeros_like(number)
        if not IS_FLAT:
            row = unit // units
        column = ((unit - row * units).to(tl.int64) * 8 + place) * column_stride
        value = ((code.to(tl.float32) - zero) * scale).to(whole.dtype.element_ty)
        tl.store(whole + matrix() * stack_stride + row.to(tl.int64) * row_stride + column, value, mask=real)


@triton.jit  # type: ignore[untyped-decorator]
def expand_tinygemm(  # type: ignore[no-untyped-def]
    whole, codes, pairs, rows, units, code_stack, tiles_across, pair_stack, pair_group, stack_stride, row_stride,
    column_stride, GROUP: tl.constexpr, INNER: tl.constexpr, FOLD: tl.constexpr,
    ROWS: tl.constexpr, UNITS: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """torchao's tiles of 8 rows x `INNER` times two units: lane `t` of 32 has row t // 4 and a pair of each unit's
    columns, in `INNER` / 2 words of two times two units, which a thread has. `GROUP` units share a scale and what is
    added."""
    row, unit, place = tile(ROWS, UNITS, TURNED)
    inside = (row < rows) & (unit < units)
    lane = tl.arange(0, 4)[None, :, None] if TURNED else tl.arange(0, 4)[None, None, :]
    lane = (row // 8 * tiles_across + unit // (INNER // 2)) * 32 + row % 8 * 4 + lane
    word = load_int(codes + matrix() * code_stack + lane * (INNER // 2) + unit % (INNER // 2), inside)
    pair = pairs + matrix() * pair_stack + unit * 4 // GROUP * pair_group + row * 2
    scale, added = load_float(pair, inside), load_float(pair + 1, inside)
    if TURNED:
        wide = tl.broadcast_to(word[:, :, None, :], (UNITS, 4, 2, ROWS))
        own = tl.reshape(wide, (UNITS, 8, ROWS)) >> (place % 2 * 16)
        for other in tl.static_range(4):
            value = (((own >> (other * 4)) & 15) - 8).to(tl.float32) * scale + added
            write(whole, value, row, unit * 4 + other, place, stack_stride, row_stride, column_stride, inside)
    else:
        wide = tl.broadcast_to(word[:, :, None, :, None], (ROWS, UNITS, 4, 4, 2))
        own = tl.reshape(wide, (ROWS, UNITS, 4, 8)) >> (place % 2 * 16)[:, None, :, :]
        code = (own >> (tl.arange(0, 4) * 4)[None, None, :, None]) & 15
        value = (code - 8).to(tl.float32) * scale[:, :, None, :] + added[:, :, None, :]
        value = tl.reshape(value, (ROWS, UNITS * 4, 8))
        write_rows(whole, value, rows, units * 4, stack_stride, row_stride, column_stride)
