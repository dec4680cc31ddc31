"""The GPU's kernel for rotary positions. Only a process that needs it imports this: Triton comes with torch for CUDA
alone."""

# ruff: noqa: N803  constants of a kernel are written large

from __future__ import annotations

import torch
import triton
import triton.language as tl

_ELEMENTS_A_PROGRAM = 1024


# Triton looks annotations up while it compiles, and knows none of Python's types.
@triton.jit  # type: ignore[untyped-decorator]
def _rotate_heads(  # type: ignore[no-untyped-def]
    x, out, batch, token, first, heads, at_batch, at_head, at_token, tokens, cos_low, cos_high, sin_low, sin_high,
    column, half, inside, HEADS: tl.constexpr,
):  # fmt: skip
    head = first + tl.arange(0, HEADS)
    there = (head < heads)[:, None] & inside
    at = x + batch * at_batch + token * at_token + head[:, None] * at_head + column
    low, high = tl.load(at, mask=there, other=0).to(tl.float32), tl.load(at + half, mask=there, other=0).to(tl.float32)
    to = out + ((batch * tokens + token) * heads + head)[:, None] * (2 * half) + column
    dtype = out.dtype.element_ty
    # Products are rounded before they are added, as torch's are.
    one, other = (low * cos_low).to(dtype).to(tl.float32), (-high * sin_low).to(dtype).to(tl.float32)
    tl.store(to, (one + other).to(dtype), mask=there)
    one, other = (high * cos_high).to(dtype).to(tl.float32), (low * sin_high).to(dtype).to(tl.float32)
    tl.store(to + half, (one + other).to(dtype), mask=there)


@triton.jit(do_not_specialize=["tokens", "q_batch", "k_batch", "cos_batch"])  # type: ignore[untyped-decorator]
def _rotate(  # type: ignore[no-untyped-def]
    q, k, cos, sin, q_out, k_out, tokens, q_heads, k_heads, q_batch, q_head, q_token, k_batch, k_head, k_token,
    cos_batch, cos_token, half, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    batch, token = (tl.program_id(0) // tokens).to(tl.int64), (tl.program_id(0) % tokens).to(tl.int64)
    column = tl.arange(0, HALF)[None, :]
    inside = column < half
    at = batch * cos_batch + token * cos_token + column
    cos_low, cos_high = tl.load(cos + at, mask=inside, other=0), tl.load(cos + at + half, mask=inside, other=0)
    sin_low, sin_high = tl.load(sin + at, mask=inside, other=0), tl.load(sin + at + half, mask=inside, other=0)
    cos_low, cos_high = cos_low.to(tl.float32), cos_high.to(tl.float32)
    sin_low, sin_high = sin_low.to(tl.float32), sin_high.to(tl.float32)
    of_queries = tl.cdiv(q_heads, HEADS)
    if tl.program_id(1) < of_queries:
        _rotate_heads(
            q, q_out, batch, token, tl.program_id(1) * HEADS, q_heads, q_batch, q_head, q_token, tokens,
            cos_low, cos_high, sin_low, sin_high, column, half, inside, HEADS,
        )  # fmt: skip
    else:
        _rotate_heads(
            k, k_out, batch, token, (tl.program_id(1) - of_queries) * HEADS, k_heads, k_batch, k_head, k_token, tokens,
            cos_low, cos_high, sin_low, sin_high, column, half, inside, HEADS,
        )  # fmt: skip


def rotate(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`q` and `k` (batch, heads, tokens, width), whose elements of a head are adjacent, rotated by `cos` and `sin`
    (batch or 1, tokens, width): the first half of each head with the second."""
    batch, q_heads, tokens, width = q.shape
    k_heads, half = k.shape[1], width // 2
    q_out, k_out = q.new_empty(batch, tokens, q_heads, width), k.new_empty(batch, tokens, k_heads, width)
    wide = triton.next_power_of_2(half)
    together = max(1, min(triton.next_power_of_2(q_heads), _ELEMENTS_A_PROGRAM // wide))
    _rotate[(batch * tokens, triton.cdiv(q_heads, together) + triton.cdiv(k_heads, together))](
        q, k, cos, sin, q_out, k_out, tokens, q_heads, k_heads, *q.stride()[:3], *k.stride()[:3],
        0 if cos.shape[0] == 1 else cos.stride(0), cos.stride(1), half, HEADS=together, HALF=wide, num_warps=4,
    )  # fmt: skip
    return q_out.transpose(1, 2), k_out.transpose(1, 2)
