"""The GPU's kernels expand quantized weights to what operators of torch make of them on the CPU, to the last bit."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from packed import packed_checkpoint
from transformers import AutoConfig

from zeroinf.model.inspect import build_meta
from zeroinf.model.quantized import bnb, fp4, fp8, ggml, gptq, hqq, integers, torchao  # noqa: F401  have operators
from zeroinf.model.quantized.expansion import Expansion, ExpansionSlot, expansions
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


@pytest.mark.parametrize("method", ["gptq", "awq", "nvfp4", "fp8", "gptq_ordered", "w4a16"])
def test_weights_are_expanded_again_by_launches_alone(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_meta(AutoConfig.from_pretrained(packed_checkpoint("llama", method, tmp_path)), "bfloat16")
    device, slot = torch.device("cuda", 0), ExpansionSlot(1 << 22, torch.device("cuda", 0))
    expansion, module = expansions(model)[0], model.model.layers[0].self_attn.q_proj.to_empty(device=device)
    for name, held in module.named_parameters():
        if held.is_floating_point() and held.itemsize > 1:
            held.data.normal_()
        else:
            held.data.view(torch.uint8).random_(0, 1 if name == "g_idx" else 100)

    def visit() -> torch.Tensor:
        slot.end = 0
        expansion.open(slot)
        found: torch.Tensor = module.weight.clone()
        expansion.close()
        return found

    with torch.inference_mode():
        first, second = visit(), visit()
        monkeypatch.setattr(Expansion, "expanded", lambda *_: pytest.fail("weights are expanded anew"))
        slot._memory.zero_()
        third = visit()
    assert first.nan_to_num().any() and torch.equal(first.nan_to_num(), second.nan_to_num())
    assert torch.equal(first.nan_to_num(), third.nan_to_num())
