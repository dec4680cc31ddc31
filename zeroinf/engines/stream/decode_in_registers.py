"""Triton functions that make weights of codes in registers, for kernels that multiply by them.

Weights are what `codes.decode` and `expand_integers` make of integers, and `expand_fp4` of MXFP4, to the bit. Those of
NVFP4 are codes times scales, exactly: what all weights of a matrix share is left to sums. Codes are read in words of
32 bits. One of four bits each becomes eight weights: those of the lower halves of its bytes and those of the upper.

A product of codes takes inputs in an order of its own. Of 128 inputs, whose codes are four chunks, a thread of the
tensor cores' left side holds one chunk of a row whole, so that it reads codes 16 bytes at a time and needs no other
thread's. `input_of` says which input comes where.
"""

# ruff: noqa: N803  constants of a kernel are written large

from __future__ import annotations

import os

import triton
import triton.language as tl

_IS_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""On a CPU, to test kernels: bfloat16 has no arithmetic there."""

INPUTS_IN_ORDER = 128
"""Inputs that are put in order together."""


# Triton looks annotations up while it compiles, and knows none of Python's types.
@triton.jit  # type: ignore[untyped-decorator]
def input_of(place, BITS: tl.constexpr, PAIRS: tl.constexpr, SIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The input that is at `place` in the order in which codes are multiplied: of those of four bits, first those of
    lower halves of bytes, each of which has two inputs side by side (`PAIRS`), or 16 apart. Each of four threads has
    SIDE of its chunk's in turn, in the order in which words give them."""
    block, turn = place // 128, place % (16 * BITS) // (4 * SIDE)
    chunk, number = place % (4 * SIDE) // SIDE, turn * SIDE + place % SIDE
    byte = number // 4 * 4 + number % 4 // 2 + number % 2 * 2
    upper = place % 128 // 64
    of_chunk = byte if BITS == 8 else byte * 2 + upper if PAIRS else upper * 16 + byte
    return block * 128 + chunk * 32 + of_chunk


_SCALED = " fma.rn.bf16x2 a, a, s, none;"
_SCALED_IN_FLOAT32 = (
    " shl.b32 b, a, 16; and.b32 a, a, 0xffff0000; mov.b32 low, b; mov.b32 high, a; mul.rn.f32 low, low, $9;"
    " mul.rn.f32 high, high, $9; cvt.rn.bf16x2.f32 a, high, low;"
)


def _assembly(pair: str, scaled: str = _SCALED, off: str = "0xc308c308") -> tl.constexpr:
    """Makes eight weights of the word $8 with the scale $9: `pair` makes two of a shifted word, for each shift, and
    `scaled` multiplies these. `off` is what is added to integers, twice."""
    begin = (
        "{ .reg .b32 a, b, s, none; .reg .f32 low, high;"
        " .reg .b32 one, off, up; mov.b32 one, 0x3f803f80; mov.b32 off, " + off + "; mov.b32 up, 0x7e807e80;"
        " mov.b32 none, 0x80008000;" + (" mov.b32 s, {$9, $9};" if scaled == _SCALED else "") + "\n"
    )
    pairs = [
        pair.format(
            shift=f"shr.u32 a, $8, {shift};",
            sign=f"shl.b32 a, $8, {12 - shift};",
            rest=f"shl.b32 b, $8, {6 - shift};" if shift < 6 else f"shr.u32 b, $8, {shift - 6};",
        )
        + f"{scaled} mov.b32 {{${2 * at}, ${2 * at + 1}}}, a;\n"
        for at, shift in enumerate((0, 8, 4, 12))
    ]
    return tl.constexpr(begin + "".join(pairs) + "}")


# 128 and a code below 16 make 0x4300 | code; numbers of E2M1 have exponents that are too low by 126.
_OF_INTEGERS = "{shift} lop3.b32 a, a, 0x000f000f, 0x43004300, 0xEA; fma.rn.bf16x2 a, a, one, off;"
_INTEGERS, _INTEGERS_IN_FLOAT32 = _assembly(_OF_INTEGERS), _assembly(_OF_INTEGERS, _SCALED_IN_FLOAT32)
_WITH_ZEROS = _assembly(_OF_INTEGERS, off="{$10, $10}")
_WITH_ZEROS_IN_FLOAT32 = _assembly(_OF_INTEGERS, _SCALED_IN_FLOAT32, "{$10, $10}")
_FLOATS = _assembly(
    "{sign} {rest} and.b32 b, b, 0x01c001c0; lop3.b32 a, a, 0x80008000, b, 0xEA; fma.rn.bf16x2 a, a, up, none;"
)


@triton.jit  # type: ignore[untyped-decorator]
def four_bits(  # type: ignore[no-untyped-def]
    word,
    scale,
    zero,
    FLOAT: tl.constexpr,
    ZEROS: tl.constexpr,
    SIDE: tl.constexpr,
    dtype: tl.constexpr,
):
    """Words (outputs, groups, 4) and scales (outputs, groups, 1 or 4) as weights (outputs, 16 x groups) of the lower
    halves of bytes, and of the upper, in the order of `input_of`: in bfloat16 nothing is rounded but products. Integers
    that stand for zero are 8, or (`ZEROS`) `zero`, which is like scales."""
    if dtype == tl.bfloat16 and not _IS_INTERPRETED:
        l0, l2, l1, l3, h0, h2, h1, h3 = _words(word, scale, zero, FLOAT, ZEROS)
    else:
        scale = scale.to(tl.float32)
        l0, l1 = _weight(word, scale, zero, FLOAT, ZEROS, dtype), _weight(word >> 8, scale, zero, FLOAT, ZEROS, dtype)
        l2 = _weight(word >> 16, scale, zero, FLOAT, ZEROS, dtype)
        l3 = _weight(word >> 24, scale, zero, FLOAT, ZEROS, dtype)
        h0 = _weight(word >> 4, scale, zero, FLOAT, ZEROS, dtype)
        h1 = _weight(word >> 12, scale, zero, FLOAT, ZEROS, dtype)
        h2 = _weight(word >> 20, scale, zero, FLOAT, ZEROS, dtype)
        h3 = _weight(word >> 28, scale, zero, FLOAT, ZEROS, dtype)
    return _in_order(l0, l1, l2, l3, SIDE), _in_order(h0, h1, h2, h3, SIDE)


@triton.jit  # type: ignore[untyped-decorator]
def _words(word, scale, zero, FLOAT: tl.constexpr, ZEROS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Eight weights in bfloat16 of each word."""
    if scale.dtype == tl.bfloat16:
        if ZEROS:
            found = tl.inline_asm_elementwise(
                _WITH_ZEROS, "=h,=h,=h,=h,=h,=h,=h,=h,r,h,h", [word, scale, (-128 - zero).to(tl.bfloat16)],
                dtype=(tl.bfloat16,) * 8, is_pure=True, pack=1,
            )  # fmt: skip
        else:
            assembly: tl.constexpr = _FLOATS if FLOAT else _INTEGERS
            found = tl.inline_asm_elementwise(
                assembly, "=h,=h,=h,=h,=h,=h,=h,=h,r,h", [word, scale], dtype=(tl.bfloat16,) * 8, is_pure=True, pack=1
            )
    elif ZEROS:
        found = tl.inline_asm_elementwise(
            _WITH_ZEROS_IN_FLOAT32, "=h,=h,=h,=h,=h,=h,=h,=h,r,f,h",
            [word, scale.to(tl.float32), (-128 - zero).to(tl.bfloat16)],
            dtype=(tl.bfloat16,) * 8, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        found = tl.inline_asm_elementwise(
            _INTEGERS_IN_FLOAT32, "=h,=h,=h,=h,=h,=h,=h,=h,r,f", [word, scale.to(tl.float32)],
            dtype=(tl.bfloat16,) * 8, is_pure=True, pack=1,
        )  # fmt: skip
    return found


@triton.jit  # type: ignore[untyped-decorator]
def _weight(code, scale, zero, FLOAT: tl.constexpr, ZEROS: tl.constexpr, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """The weight of the lowest four bits, in arithmetic of float32."""
    if FLOAT:
        value = (((code & 8) << 28) | ((code & 7) << 22)).to(tl.float32, bitcast=True) * 8.507059173023462e37
    else:
        value = ((code & 15) - (zero if ZEROS else 8)).to(tl.float32)
    return (value * scale).to(dtype)


@triton.jit  # type: ignore[untyped-decorator]
def _in_order(b0, b1, b2, b3, SIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The weights (outputs, chunks, words) of each byte of words, in the order of `input_of`."""
    outputs: tl.constexpr = b0.shape[0]
    chunks: tl.constexpr = b0.shape[1]
    of_chunk: tl.constexpr = 4 * b0.shape[2]
    words = tl.join(tl.join(b0, b1), tl.join(b2, b3))  # bytes of a word are in the order 0, 2, 1, 3
    turns = tl.reshape(words, (outputs, chunks // 4, 4, of_chunk // SIDE, SIDE))
    return tl.reshape(tl.permute(turns, (0, 1, 3, 2, 4)), (outputs, chunks * of_chunk))


@triton.jit  # type: ignore[untyped-decorator]
def power_of_two(code, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """What a byte stands for as the exponent of a scale."""
    bits = tl.where(code == 0, 0x00400000, code.to(tl.int32) << 23)
    return bits.to(tl.float32, bitcast=True).to(dtype)


# A byte in the lowest bits of 2^23 is a float32, and an integer below 256 is a bfloat16.
_BYTES = tl.constexpr(
    "{ .reg .b32 b, s, none; .reg .f32 f, g; mov.b32 s, {$5, $5}; mov.b32 none, 0x80008000;\n"
    + "".join(
        f"prmt.b32 b, $4, 0x4b000000, 0x744{one}; mov.b32 f, b; add.f32 f, f, 0fCB000080;"
        f" prmt.b32 b, $4, 0x4b000000, 0x744{other}; mov.b32 g, b; add.f32 g, g, 0fCB000080;"
        f" cvt.rn.bf16x2.f32 b, g, f; fma.rn.bf16x2 b, b, s, none; mov.b32 {{${2 * at}, ${2 * at + 1}}}, b;\n"
        for at, (one, other) in enumerate(((0, 2), (1, 3)))
    )
    + "}"
)


@triton.jit  # type: ignore[untyped-decorator]
def eight_bits(word, scale, SIDE: tl.constexpr, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Words (outputs, chunks, 8) and scales (outputs, chunks, 1) as weights (outputs, 32 x chunks), in the order of
    `input_of`."""
    if dtype == tl.bfloat16 and not _IS_INTERPRETED:
        b0, b2, b1, b3 = tl.inline_asm_elementwise(
            _BYTES, "=h,=h,=h,=h,r,h", [word, scale], dtype=(tl.bfloat16,) * 4, is_pure=True, pack=1
        )
    else:
        scale = scale.to(tl.float32)
        b0, b1 = _of_byte(word, scale, dtype), _of_byte(word >> 8, scale, dtype)
        b2, b3 = _of_byte(word >> 16, scale, dtype), _of_byte(word >> 24, scale, dtype)
    return _in_order(b0, b1, b2, b3, SIDE)


@triton.jit  # type: ignore[untyped-decorator]
def _of_byte(code, scale, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """The weight of the lowest eight bits, in arithmetic of float32."""
    return (((code & 255) - 128).to(tl.float32) * scale).to(dtype)
