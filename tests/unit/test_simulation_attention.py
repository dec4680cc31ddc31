"""What attention takes on a GPU by kernel, for every way in which models ask for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from recorded import Recorded, cut
from torch.nn import functional

from zeroinf.simulation.attention import GpuAttention
from zeroinf.simulation.recorder import Recorder

ROWS, HEADS = 3, 4


def attend(
    dtype: torch.dtype = torch.bfloat16,
    *,
    size: int = 64,
    value_size: int | None = None,
    length: int = 10,
    past: int = 0,
    kv_heads: int = HEADS,
    mask: torch.dtype | None = None,
    **how: Any,
) -> tuple[Recorded, torch.Tensor]:
    """What is recorded of one attention, its operands not among it, and what comes out."""
    meta: dict[str, Any] = {"device": "meta", "dtype": dtype}
    keys = length + past
    recorder = Recorder(set(), [])
    with recorder, GpuAttention(recorder):
        query = torch.empty(ROWS, HEADS, length, size, **meta)
        key = torch.empty(ROWS, kv_heads, keys, size, **meta)
        value = torch.empty(ROWS, kv_heads, keys, value_size or size, **meta)
        bias = None if mask is None else torch.empty(ROWS, 1, length, keys, device="meta", dtype=mask)
        cut(recorder)
        out = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, **how)
        return cut(recorder), out


def peak(step: Recorded) -> int:
    alive: dict[int, int] = {}
    most = 0
    for event in step.events:
        if event.nbytes is None:
            alive.pop(event.key)
        else:
            alive[event.key] = event.nbytes
        most = max(most, sum(alive.values()))
    return most


def out_bytes(length: int, size: int, width: int) -> int:
    return ROWS * HEADS * length * size * width


@pytest.mark.parametrize("size", [64, 80, 128, 192, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_without_a_mask_flash_takes_its_output_and_one_float_a_query(dtype: torch.dtype, size: int) -> None:
    step, out = attend(dtype, size=size, is_causal=True)
    assert out.shape == (ROWS, HEADS, 10, size)
    assert peak(step) == out_bytes(10, size, 2) + ROWS * HEADS * 10 * 4
    assert [event.nbytes for event in step.events if event.nbytes] == [out_bytes(10, size, 2), ROWS * HEADS * 10 * 4]


def test_flash_takes_grouped_queries_as_they_are() -> None:
    step, _ = attend(kv_heads=2, enable_gqa=True, is_causal=True)
    assert peak(step) == out_bytes(10, 64, 2) + ROWS * HEADS * 10 * 4


def test_queries_come_out_beside_their_heads_so_that_joining_heads_copies_nothing() -> None:
    for mask in (None, torch.bfloat16):
        _, out = attend(mask=mask)
        assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(("keys", "padded"), [(16, 0), (32, 0), (10, 16), (17, 32)])
def test_a_bias_is_padded_to_16_keys_and_one_that_fits_is_used_as_it_is(keys: int, padded: int) -> None:
    step, _ = attend(length=5, past=keys - 5, mask=torch.bfloat16)
    assert peak(step) == ROWS * 5 * padded * 2 + out_bytes(5, 64, 2)


def test_a_mask_of_yes_and_no_becomes_a_bias_first() -> None:
    step, _ = attend(length=16, mask=torch.bool)
    small = 2 * 2  # the two values
    assert ROWS * 16 * 16 * 2 + out_bytes(16, 64, 2) <= peak(step) <= ROWS * 16 * 16 * 2 + out_bytes(16, 64, 2) + small


@pytest.mark.parametrize(("size", "dtype", "buffer"), [
    (128, torch.bfloat16, False), (192, torch.bfloat16, True), (256, torch.float16, True), (256, torch.float32, False),
])  # fmt: skip
def test_beyond_128_half_precision_adds_up_in_a_float_buffer(size: int, dtype: torch.dtype, buffer: bool) -> None:
    step, _ = attend(dtype, size=size, length=16, mask=dtype)
    assert peak(step) == out_bytes(16, size, dtype.itemsize) + (out_bytes(16, size, 4) if buffer else 0)


def test_float32_never_takes_flash() -> None:
    step, _ = attend(torch.float32, is_causal=True)
    assert peak(step) == out_bytes(10, 64, 4)


def test_values_of_another_size_than_keys_never_take_flash() -> None:
    step, out = attend(size=192, value_size=128, is_causal=True)
    assert out.shape == (ROWS, HEADS, 10, 128)
    assert peak(step) == out_bytes(10, 128, 2)


@pytest.mark.parametrize(
    "how", [{"mask": torch.bfloat16}, {"dtype": torch.float32, "is_causal": True}, {"size": 320, "is_causal": True}]
)
def test_grouped_queries_that_flash_does_not_take_are_matrix_products_over_repeated_keys(how: dict[str, Any]) -> None:
    width = 4 if how.get("dtype") is torch.float32 else 2
    step, _ = attend(kv_heads=2, enable_gqa=True, length=64, **how)
    scores = ROWS * HEADS * 64 * 64 * width
    repeated = 2 * out_bytes(64, how.get("size", 64), width)
    assert peak(step) > scores + repeated


@pytest.mark.parametrize(("length", "past"), [(10, 0), (1, 40)])
def test_flash_counts_two_products_of_every_query_with_every_key(length: int, past: int) -> None:
    step, _ = attend(mask=None, length=length, past=past)
    keys = length + past
    flops = ROWS * HEADS * length * keys * (2 * 64 + 2 * 64)
    operands = 2 * ROWS * HEADS * 64 * (2 * length + 2 * keys)
    kernel = step.kernels[0].kernels[-1]
    assert (kernel.operator, kernel.flops, kernel.nbytes) == ("attention", flops, operands)


@pytest.mark.parametrize(("size", "width"), [(64, 80), (80, 128), (128, 128), (136, 192)])
@pytest.mark.parametrize(("length", "past"), [(10, 0), (1, 40)])
def test_the_efficient_kernel_counts_heads_by_the_tile_and_110_keys_more(
    size: int, width: int, length: int, past: int
) -> None:
    step, _ = attend(mask=torch.bfloat16, size=size, length=length, past=past)
    keys = length + past
    flops = ROWS * HEADS * length * keys * (2 * width + 2 * width)
    operands = 2 * ROWS * HEADS * (2 * size * length + 2 * width * (keys + 110))
    kernel = step.kernels[0].kernels[-1]
    assert (kernel.operator, kernel.flops, kernel.nbytes) == ("efficient attention", flops, operands)


def test_attention_on_the_host_is_left_alone() -> None:
    recorder = Recorder(set(), [])
    query = torch.randn(1, 2, 3, 8)
    with recorder, GpuAttention(recorder):
        out = functional.scaled_dot_product_attention(query, query, query)
    assert torch.equal(out, functional.scaled_dot_product_attention(query, query, query))
