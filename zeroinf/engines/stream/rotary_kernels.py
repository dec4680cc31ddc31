"""The GPU's kernel for rotary embeddings. Only a process that needs it imports this: Triton comes with torch for CUDA
alone."""

# ruff: noqa: N803  constants of a kernel are written large

from __future__ import annotations

import torch
import triton
import triton.language as tl

from zeroinf.compat.launches import Launch

_ELEMENTS_A_PROGRAM = 2048


# Triton looks annotations up while it compiles, and knows none of Python's types.
@triton.jit  # type: ignore[untyped-decorator]
def _turn(  # type: ignore[no-untyped-def]
    x, out, cos, sin, token, inside_tokens, token_step, head_step, heads, head,
    WIDTH: tl.constexpr, TURNED: tl.constexpr, TABLE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, COLUMNS)
    turned = column < TURNED
    inside = inside_tokens[:, None] & (column < WIDTH)[None, :]
    turns = inside_tokens[:, None] & turned[None, :]
    is_first = column < TURNED // 2
    other = tl.where(is_first, column + TURNED // 2, column - TURNED // 2)
    at = x + token[:, None] * token_step + head * head_step
    value = tl.load(at + column[None, :], mask=inside, other=0)
    pair = tl.load(at + other[None, :], mask=turns, other=0).to(tl.float32)
    table = token[:, None] * TABLE + (column % TABLE)[None, :]
    scale = tl.load(cos + table, mask=turns, other=0).to(tl.float32)
    other_scale = tl.load(sin + table, mask=turns, other=0).to(tl.float32)
    dtype = out.dtype.element_ty
    pair = tl.where(is_first[None, :], -pair, pair)
    # Rounded where torch rounds: after each product, and after the sum.
    kept = (value.to(tl.float32) * scale).to(dtype).to(tl.float32)
    sum_of_both = (kept + (pair * other_scale).to(dtype).to(tl.float32)).to(dtype)
    to = out + (token[:, None] * heads + head) * WIDTH + column[None, :]
    tl.store(to, tl.where(turned[None, :], sum_of_both, value), mask=inside)


@Launch
@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["tokens", "q_heads", "k_heads", "q_token", "q_head", "k_token", "k_head"]
)
def _rotate(  # type: ignore[no-untyped-def]
    q, k, cos, sin, q_out, k_out, tokens, q_heads, k_heads, q_token, q_head, k_token, k_head,
    WIDTH: tl.constexpr, TURNED: tl.constexpr, TABLE: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    inside = token < tokens
    head = tl.program_id(1)
    if head < q_heads:
        _turn(q, q_out, cos, sin, token, inside, q_token, q_head, q_heads, head, WIDTH, TURNED, TABLE, COLUMNS)
    else:
        _turn(
            k, k_out, cos, sin, token, inside, k_token, k_head, k_heads, head - q_heads, WIDTH, TURNED, TABLE, COLUMNS
        )


def rotate(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, turned: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`q` and `k` (1, heads, tokens, width) of one dtype, whose first `turned` columns are turned by the angles whose
    cosines and sines are `cos` and `sin`, (1, tokens, turned) or (1, tokens, turned / 2), contiguous.

    The results lie in memory token by token.
    """
    _, q_heads, tokens, width = q.shape
    k_heads = k.shape[1]
    q_out, k_out = q.new_empty(1, tokens, q_heads, width), k.new_empty(1, tokens, k_heads, width)
    wide = 1 << (width - 1).bit_length()
    together = max(1, _ELEMENTS_A_PROGRAM // wide)
    _rotate(
        (-(-tokens // together), q_heads + k_heads), (q, k, cos, sin, q_out, k_out),
        (tokens, q_heads, k_heads, q.stride(2), q.stride(1), k.stride(2), k.stride(1)),
        WIDTH=width, TURNED=turned, TABLE=cos.shape[-1], TOKENS=together, COLUMNS=wide,
        enable_fp_fusion=False,  # a product and a sum in one would leave a rounding out
    )  # fmt: skip
    return q_out.transpose(1, 2), k_out.transpose(1, 2)
