"""The kernel for rotary embeddings gives what torch gives, to rounding."""

from __future__ import annotations

import pytest
import torch
from small_models import build_model

from zeroinf.engines.stream.rotary import rotary_kernel, turn

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("width", "turned", "table"), [(128, 128, 128), (64, 64, 32), (96, 24, 24), (80, 32, 16)])
def test_it_turns_as_torch_does(width: int, turned: int, table: int, dtype: torch.dtype) -> None:
    from zeroinf.engines.stream.rotary_kernels import rotate

    device = torch.device("cuda", 0)
    q, k = (torch.randn(1, 1001, heads, width, device=device, dtype=dtype).transpose(1, 2) for heads in (12, 3))
    angles = torch.randn(1, 1001, turned // 2, device=device).repeat(1, 1, 2 * table // turned)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    for x, found in zip((q, k), rotate(q, k, cos, sin, turned), strict=True):
        assert torch.allclose(found, turn(x, cos, sin, turned), rtol=0.01, atol=0.03)
    assert rotary_kernel(build_model("llama").to(dtype), device) is rotate
