"""The GPU's expansion of every form of codes, interpreted on the CPU: `TRITON_INTERPRET=1`, and Triton."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

from zeroinf.model.quantized import bnb, fp4, fp8, ggml, gptq, integers  # noqa: F401  register their operators
from zeroinf.model.quantized.fused import EXAMPLES

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None,
    reason="needs TRITON_INTERPRET=1 and Triton",
)


@pytest.mark.parametrize("is_turned", [False, True])
@pytest.mark.parametrize("name", EXAMPLES)
def test_a_kernel_computes_what_the_operators_of_torch_do(name: str, is_turned: bool) -> None:
    from zeroinf.model.quantized import expansion_kernels

    example, (stack, rows, columns) = EXAMPLES[name], (2, 32, 768)
    args = example.random(stack, rows, columns, torch.Generator().manual_seed(0))
    right = torch.empty(stack, rows, columns)
    getattr(torch.ops.zeroinf, example.operator)(right, *args)
    whole = torch.full((stack, rows + 3, columns + 16), torch.inf)  # with gaps between rows and matrices
    whole = whole.mT.contiguous().mT if is_turned else whole
    found = whole[:, :rows, :columns]
    getattr(expansion_kernels, example.operator)(found, *args)
    assert torch.equal(found.nan_to_num(), right.nan_to_num())
    found.fill_(torch.inf)
    assert whole.isinf().all()  # nothing is written beside it
