"""The GPU's kernels expand quantized weights to what the CPU makes of them, to the last bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from zeroinf.model.quantized.ggml import QUANTIZED_TYPES, expand

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def random_bytes(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def same(found: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.equal(found.cpu().contiguous().nan_to_num(), right.nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", sorted(QUANTIZED_TYPES))
def test_blocks_of_ggml(number: int, dtype: torch.dtype) -> None:
    kind = QUANTIZED_TYPES[number]
    packed = random_bytes(3, 50, 3 * kind.nbytes)
    right = torch.empty(3, 50, 3 * kind.weights, dtype=dtype)
    expand(packed, kind, right)
    for turned in (False, True):
        whole = torch.empty(3, 3 * kind.weights, 50, dtype=dtype, device="cuda").transpose(1, 2)
        whole = whole if turned else whole.contiguous()
        expand(packed.cuda(), kind, whole)
        assert same(whole, right)


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_of_gpt_oss(dtype: torch.dtype) -> None:
    blocks, scales = random_bytes(3, 70, 4, 16), 115 + random_bytes(3, 70, 4) % 20
    right, found = torch.empty(3, 128, 70, dtype=dtype), torch.empty(3, 128, 70, dtype=dtype, device="cuda")
    torch.ops.zeroinf.expand_fp4(right.transpose(1, 2), blocks, scales)
    torch.ops.zeroinf.expand_fp4(found.transpose(1, 2), blocks.cuda(), scales.cuda())
    assert same(found, right)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("bits", "less", "awq", "ordered"),
    [(4, 1, False, False), (4, 0, False, True), (8, 1, False, False), (2, 1, False, False), (4, 0, True, False)],
)
def test_words_of_gptq_and_awq(bits: int, less: int, awq: bool, ordered: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)

    def words(*shape: int) -> torch.Tensor:
        return torch.randint(-(1 << 31), 1 << 31, shape, generator=generator).int()

    each = 32 // bits
    codes = words(2, 96, 64 // each) if awq else words(2, 96 // each, 64)
    zeros, scales = words(2, 3, 64 // each), torch.rand(2, 3, 64, generator=generator).half()
    order = torch.stack([torch.randperm(96, generator=generator) // 32 for _ in range(2)]).int() if ordered else None
    given: list[Any] = [codes, zeros, scales, order]
    right, found = torch.empty(2, 64, 96, dtype=dtype), torch.empty(2, 64, 96, dtype=dtype, device="cuda")
    torch.ops.zeroinf.expand_words(right, *given, bits, less, awq)
    torch.ops.zeroinf.expand_words(found, *(None if one is None else one.cuda() for one in given), bits, less, awq)
    assert same(found, right)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_in_blocks_that_do_not_fill_it(dtype: torch.dtype) -> None:
    codes = random_bytes(2, 70, 100).view(torch.float8_e4m3fn)
    scales = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0))
    right, found = torch.empty(2, 70, 100, dtype=dtype), torch.empty(2, 70, 100, dtype=dtype, device="cuda")
    torch.ops.zeroinf.expand_fp8(right, codes, scales, 32, 32)
    torch.ops.zeroinf.expand_fp8(found, codes.cuda(), scales.cuda(), 32, 32)
    assert same(found, right)
