"""Triton functions that make weights of codes in registers, for kernels that multiply by them.

Weights are what `codes.decode` makes of integers, and `expand_fp4` of MXFP4, to the bit.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

_IS_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""On a CPU, to test kernels: bfloat16 has no arithmetic there."""


# Triton looks annotations up while it compiles, and knows none of Python's types.
# Two bytes, each of two codes, to two bfloat16: 128 and a code below 16 make 0x4300 | code.
_FOUR_LOW = tl.constexpr("""{
.reg .b32 a;
cvt.u32.u16 a, $1;
prmt.b32 a, a, 0x43434343, 0x4140;
and.b32 $0, a, 0xff0fff0f;
}""")
_FOUR_HIGH = tl.constexpr("""{
.reg .b32 a;
cvt.u32.u16 a, $1;
prmt.b32 a, a, 0x43434343, 0x4140;
shr.u32 a, a, 4;
lop3.b32 $0, a, 0x000f000f, 0x43004300, 0xEA;
}""")


@triton.jit  # type: ignore[untyped-decorator]
def four_bits(code, scale, is_high: tl.constexpr, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Half of the codes (rows, groups, of each) as weights, to the bit: in bfloat16 nothing is rounded but products."""
    if dtype == tl.bfloat16 and not _IS_INTERPRETED:
        assembly: tl.constexpr = _FOUR_HIGH if is_high else _FOUR_LOW
        value = tl.inline_asm_elementwise(assembly, "=r,h", [code], dtype=tl.bfloat16, is_pure=True, pack=2)
        return (value - 136.0) * scale
    code = code >> 4 if is_high else code & 15
    return ((code.to(tl.int32) - 8).to(tl.float32) * scale.to(tl.float32)).to(dtype)


# Two bytes, each of two numbers of four bits, to two bfloat16 whose exponents are too low by 126.
_FLOAT_LOW = tl.constexpr("""{
.reg .b32 a, s, e;
cvt.u32.u16 a, $1;
prmt.b32 a, a, 0, 0x4140;
shl.b32 s, a, 12;
shl.b32 e, a, 6;
and.b32 e, e, 0x01c001c0;
lop3.b32 $0, s, 0x80008000, e, 0xEA;
}""")
_FLOAT_HIGH = tl.constexpr("""{
.reg .b32 a, s, e;
cvt.u32.u16 a, $1;
prmt.b32 a, a, 0, 0x4140;
shl.b32 s, a, 8;
shl.b32 e, a, 2;
and.b32 e, e, 0x01c001c0;
lop3.b32 $0, s, 0x80008000, e, 0xEA;
}""")


@triton.jit  # type: ignore[untyped-decorator]
def four_bit_floats(code, scale, is_high: tl.constexpr, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """The same for E2M1, a sign, two bits of exponent and one of mantissa: nothing is rounded in bfloat16."""
    if dtype == tl.bfloat16 and not _IS_INTERPRETED:
        assembly: tl.constexpr = _FLOAT_HIGH if is_high else _FLOAT_LOW
        value = tl.inline_asm_elementwise(assembly, "=r,h", [code], dtype=tl.bfloat16, is_pure=True, pack=2)
        return value * 8.507059173023462e37 * scale
    code = (code >> 4 if is_high else code & 15).to(tl.int32)
    value = (((code & 8) << 28) | ((code & 7) << 22)).to(tl.float32, bitcast=True) * 8.507059173023462e37
    return (value * scale.to(tl.float32)).to(dtype)


@triton.jit  # type: ignore[untyped-decorator]
def power_of_two(code, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """What a byte stands for as the exponent of a scale."""
    bits = tl.where(code == 0, 0x00400000, code.to(tl.int32) << 23)
    return bits.to(tl.float32, bitcast=True).to(dtype)


@triton.jit  # type: ignore[untyped-decorator]
def eight_bits(code, scale, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Codes of 8 bits (rows, groups, of each) as weights."""
    value = (code ^ 128).to(tl.int8, bitcast=True)
    if dtype == tl.bfloat16 and not _IS_INTERPRETED:
        return value.to(tl.bfloat16) * scale
    return (value.to(tl.float32) * scale.to(tl.float32)).to(dtype)
