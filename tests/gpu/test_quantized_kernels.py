"""The GPU's kernels expand quantized weights to what operators of torch make of them on the CPU, to the last bit."""

from __future__ import annotations

import warnings

import pytest
import torch

from zeroinf.model.quantized import bnb, fp4, fp8, ggml, gptq, hqq, integers, torchao  # noqa: F401  have operators
from zeroinf.model.quantized.fused import EXAMPLES

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", EXAMPLES)
def test_a_kernel_computes_what_the_cpu_does(name: str, dtype: torch.dtype) -> None:
    example, shape = EXAMPLES[name], (3, 160, 1280)
    args = example.random(*shape, torch.Generator().manual_seed(0))
    operator = getattr(torch.ops.zeroinf, example.operator)
    right = torch.empty(shape, dtype=dtype)
    operator(right, *args)
    on_gpu = [one.cuda() if isinstance(one, torch.Tensor) else one for one in args]
    for is_turned in (False, True):
        whole = torch.empty(3, 1280, 160, dtype=dtype, device="cuda").transpose(1, 2)
        whole = whole if is_turned else whole.contiguous()
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # the kernel is used, and nothing in its place
            operator(whole, *on_gpu)
        assert torch.equal(whole.cpu().contiguous().nan_to_num(), right.nan_to_num())
