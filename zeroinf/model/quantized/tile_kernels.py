"""Common parts of the Triton kernels that expand packed weights: a program's tile, and loads and stores in it.

A tile is some rows of one matrix by some units, a unit being eight weights of a row that lie side by side. A thread
computes whole units: it reads the bytes of one at once and each scale once for eight weights, and writes 16 bytes at
once, while the shifts that separate the codes of a unit are constants.
"""

# ruff: noqa: N803  constants of a kernel are written large

from __future__ import annotations

import triton
import triton.language as tl


# Triton looks annotations up while it compiles, and knows none of Python's types.
@triton.jit  # type: ignore[untyped-decorator]
def tile(ROWS: tl.constexpr, UNITS: tl.constexpr, TURNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows (64 bits) and units of this program's tile, and the places in a unit, to be broadcast to the whole tile.

    Rows come last where those lie side by side in memory, since threads take elements of the last dimension first. So
    do programs of the first axis of the grid.
    """
    down, across = tl.program_id(1), tl.program_id(0)
    if TURNED:
        down, across = across, down
        row, unit = tl.arange(0, ROWS)[None, None, :], tl.arange(0, UNITS)[:, None, None]
        place = tl.arange(0, 8)[None, :, None]
    else:
        row, unit = tl.arange(0, ROWS)[:, None, None], tl.arange(0, UNITS)[None, :, None]
        place = tl.arange(0, 8)[None, None, :]
    return (down * ROWS + row).to(tl.int64), across * UNITS + unit, place


@triton.jit
def matrix():  # type: ignore[no-untyped-def]
    """The number of this program's matrix in a stack (64 bits)."""
    return tl.program_id(2).to(tl.int64)


@triton.jit
def write(whole, value, row, unit, place, stack_stride, row_stride, column_stride, inside):  # type: ignore[no-untyped-def]
    column = (unit * 8 + place).to(tl.int64)
    to = whole + matrix() * stack_stride + row * row_stride + column * column_stride
    tl.store(to, value.to(whole.dtype.element_ty), mask=inside)


@triton.jit
def write_rows(whole, value, rows, units, stack_stride, row_stride, column_stride):  # type: ignore[no-untyped-def]
    """Write a tile (rows, units, eight) by warps that each have parts of few rows, however many rows there are."""
    row = tl.program_id(1).to(tl.int64) * value.shape[0] + tl.arange(0, value.shape[0])[:, None]
    column = tl.program_id(0) * (value.shape[1] * 8) + tl.arange(0, value.shape[1] * 8)[None, :]
    to = whole + matrix() * stack_stride + row * row_stride + column * column_stride
    own = tl.reshape(value.to(whole.dtype.element_ty), (value.shape[0], value.shape[1] * 8))
    tl.store(to, own, mask=(row < rows) & (column < units * 8))


@triton.jit
def load_int(at, inside):  # type: ignore[no-untyped-def]
    """An integer of any width, as 32 bits."""
    return tl.load(at, mask=inside, other=0).to(tl.int32)


@triton.jit
def load_float(at, inside):  # type: ignore[no-untyped-def]
    return tl.load(at, mask=inside, other=0).to(tl.float32)


@triton.jit
def load_half(at, inside):  # type: ignore[no-untyped-def]
    """The float16 in two bytes at an even address."""
    return load_float(at.to(tl.pointer_type(tl.float16)), inside)


@triton.jit
def load_signed(at, inside):  # type: ignore[no-untyped-def]
    """A byte with a sign, as float32."""
    return load_float(at.to(tl.pointer_type(tl.int8)), inside)


@triton.jit
def load_short(at, inside):  # type: ignore[no-untyped-def]
    """The 16 bits, without a sign, at an even address."""
    return load_int(at.to(tl.pointer_type(tl.uint16)), inside)


@triton.jit  # type: ignore[untyped-decorator]
def load_eight(at, inside, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Eight bytes, in two words, at an address that `ALIGNED` (1 or 4) divides."""
    if ALIGNED == 4:
        words = at.to(tl.pointer_type(tl.int32))
        return load_int(words, inside), load_int(words + 1, inside)
    words, shift = _words_at(at)
    low, middle = load_int(words, inside), load_int(words + 1, inside)
    high = load_int(words + 2, inside & (shift > 0))
    return joined(low, middle, shift), joined(middle, high, shift)


@triton.jit
def _words_at(at):  # type: ignore[no-untyped-def]
    """The word that has the first of some bytes, and how far they have to be shifted."""
    address = at.to(tl.int64)
    first = address & 3
    return (address - first).to(tl.pointer_type(tl.int32)), first.to(tl.int32) * 8


@triton.jit
def joined(low, high, shift):  # type: ignore[no-untyped-def]
    """32 bits from bit `shift` on of two words."""
    both = (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)
    return (both >> shift).to(tl.int32)


@triton.jit
def byte_of(low, high, place):  # type: ignore[no-untyped-def]
    """The byte of each place, of two words."""
    return (tl.where(place < 4, low, high) >> (place % 4 * 8)) & 255


@triton.jit
def e2m1(bits):  # type: ignore[no-untyped-def]
    """The value of a code in the highest four of 32 bits: as a float32 its exponent is too low by 126."""
    found = (bits & -0x80000000) | ((bits >> 6) & 0x01C00000)
    return found.to(tl.float32, bitcast=True) * 8.507059173023462e37


@triton.jit
def e4m3(bits):  # type: ignore[no-untyped-def]
    """The value of a code in the highest eight of 32 bits: as a float32 its exponent is too low by 120."""
    size = (bits >> 4) & 0x07F00000
    value = ((bits & -0x80000000) | size).to(tl.float32, bitcast=True) * 1.329227995784916e36
    return tl.where(size == 0x07F00000, float("nan"), value)


@triton.jit
def half_e8m0(code):  # type: ignore[no-untyped-def]
    """Half of the power of two that a byte stands for."""
    bits = tl.where(code < 2, 0x00200000 << tl.minimum(code, 1), (code - 1) << 23)
    return bits.to(tl.float32, bitcast=True)
