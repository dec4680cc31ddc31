"""The GPU's expansion of whole blocks, interpreted on the CPU: `TRITON_INTERPRET=1`, Triton and a numpy before 2.4."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

from zeroinf.model.quantized import fp8 as _registers_its_operator  # noqa: F401
from zeroinf.model.quantized.ggml import QUANTIZED_TYPES, expand

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None,
    reason="needs TRITON_INTERPRET=1 and Triton",
)


def same(found: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.equal(found.nan_to_num(), right.nan_to_num())


@pytest.mark.parametrize("number", [2, 8, 12, 13, 14])
def test_blocks_are_expanded_to_the_bit(number: int) -> None:
    from zeroinf.model.quantized.block_kernels import expand_ggml

    kind = QUANTIZED_TYPES[number]
    packed = torch.randint(0, 256, (3, 5, 3 * kind.nbytes), dtype=torch.uint8)
    right = torch.empty(3, 5, 3 * kind.weights)
    expand(packed, kind, right)
    found = torch.empty(3, 7, 4 * kind.weights)[:, :5, : 3 * kind.weights]  # with gaps between rows and stacks
    expand_ggml(found, packed, number, kind.weights, kind.nbytes)
    assert same(found, right)


def test_fp8_is_expanded_to_the_bit() -> None:
    from zeroinf.model.quantized.block_kernels import expand_fp8

    codes = torch.arange(256, dtype=torch.uint8).repeat(3, 70, 1).view(torch.float8_e4m3fn)
    scales = torch.rand(3, 2, 2)
    right, found = torch.empty(3, 70, 256), torch.empty(3, 70, 256)
    torch.ops.zeroinf.expand_fp8(right, codes, scales, 64, 128)
    assert expand_fp8(found, codes.view(torch.uint8), scales, 64, 128)
    assert same(found, right)
