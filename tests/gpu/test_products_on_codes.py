"""Products on codes, and experts by kernels, on a GPU: in bfloat16 those of torch with the weights, up to rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from packed import fill_codes, packed_checkpoint
from quantized import mxfp4_checkpoint
from small_models import CONTEXT, build_model

from zeroinf.compat.models import is_experts
from zeroinf.engines.stream.coded_weight import CodedWeight, WeightMatrix
from zeroinf.engines.stream.expand import Expander
from zeroinf.engines.stream.experts import use_experts_kernels
from zeroinf.engines.stream.norms import NormByKernel, use_norm_kernels
from zeroinf.engines.stream.products import product_on_codes
from zeroinf.engines.stream.tensor_groups import group_tensors
from zeroinf.model.inspect import build_meta, find_stacks
from zeroinf.model.quantized.expansion import expansions
from zeroinf.model.resolve import resolve_model
from zeroinf.planner.wire import CODES, Wire

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda", 0)
CODED = ["mxfp4", "fp8_experts_fp4", "nvfp4", "modelopt_nvfp4", "w4a16", "w4a16_asymmetric", "gptq", "awq"]
"""Ways in which checkpoints have experts that are multiplied as codes."""


def logits(model: Any, wire: Wire, ids: torch.Tensor, *, on_codes: bool) -> torch.Tensor:
    """Of `model`, whose layers compute from pieces."""
    groups, *_ = group_tensors(model, wire)
    product = product_on_codes(GPU, groups) if on_codes else None
    assert (product is not None) == on_codes
    by_kernels = on_codes and use_experts_kernels(model, GPU, CODES[wire])
    names = [tensor.names[0] for group in groups for tensor in group.tensors]
    passing = [name for name in names if ".experts." in name and by_kernels]
    expander = Expander(groups, GPU, product, passing)
    layers = [layer for _, stack in find_stacks(model) for layer in stack]
    for group, layer in zip(groups, layers, strict=True):
        piece = torch.zeros(group.nbytes, dtype=torch.uint8)
        for tensor, target in group.targets(piece, torch.device("cpu")):
            target.write(tensor.value.detach().cpu())
        expanded, moved = expander.on(group), piece.to(GPU)
        assert any(isinstance(view, CodedWeight) for _, view in expanded.views) == on_codes
        for tensor, stands_for_it in expanded.views:
            tensor.bind(stands_for_it)
        layer.register_forward_pre_hook(lambda *_, own=expanded, p=moved: own.fill(p))
    with torch.inference_mode():
        found: torch.Tensor = model(ids, use_cache=False).logits.float()
    return found


def close(found: torch.Tensor, right: torch.Tensor) -> bool:
    """Most tokens' logits: in bfloat16 some go to other experts."""
    error = float(((found - right).norm(dim=-1) / right.norm(dim=-1)).median())
    print(f"off by {error:.4f}")
    return error < 0.015


@pytest.mark.parametrize("wire", ["int4", "int8"])
@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen3_moe", "gpt2"])
@pytest.mark.parametrize("rows", [1, 4])
def test_logits_are_those_of_expanded_weights(name: str, wire: Wire, rows: int) -> None:
    tokens = 3 if rows == 1 else CONTEXT - 50  # few rows of each expert, and many
    ids = torch.randint(1, 90, (rows, tokens), generator=torch.Generator().manual_seed(tokens)).to(GPU)
    found, right = (
        logits(build_model(name).to(GPU, torch.bfloat16), wire, ids, on_codes=on_codes) for on_codes in (True, False)
    )
    assert close(found, right)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_experts_in_sixteen_bits_are_as_near_to_float32_as_those_of_transformers(name: str) -> None:
    model, ids = build_model(name).to(GPU, torch.bfloat16), torch.randint(1, 90, (3, 100), device=GPU)
    with torch.inference_mode():
        exact = build_model(name).to(GPU, torch.bfloat16).float()(ids, use_cache=False).logits
        theirs = model(ids, use_cache=False).logits.float()
        use_experts_kernels(model, GPU, None)
        assert model.config._experts_implementation == "zeroinf"
        own = model(ids, use_cache=False).logits.float()
    errors = [float(((one - exact).norm(dim=-1) / exact.norm(dim=-1)).median()) for one in (own, theirs)]
    print("off by {:.4f} theirs {:.4f}".format(*errors))
    assert errors[0] < 1.25 * errors[1]


def test_experts_of_many_rows_are_captured_as_a_graph() -> None:
    model = build_model("qwen3_moe").to(GPU, torch.bfloat16)
    use_experts_kernels(model, GPU, None)
    (module, *_) = [m for m in model.modules() if hasattr(m, "gate_up_proj")]
    x = torch.randn(300, module.gate_up_proj.shape[2], device=GPU, dtype=torch.bfloat16)
    weights, index = torch.rand(300, 4, device=GPU).topk(2)
    with torch.inference_mode():
        module(x, index, weights)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = module(x, index, weights)
        index.copy_(torch.rand(300, 4, device=GPU).topk(2).indices)
        graph.replay()
        assert close(out.float(), module(x, index, weights).float())


@pytest.mark.parametrize(
    ("method", "tokens"),
    [
        ("mxfp4", 40),
        *((method, 3) for method in CODED),
        *((method, 600) for method in CODED),
    ],
)
def test_experts_of_a_checkpoint_are_multiplied_as_codes(method: str, tokens: int, tmp_path: Path) -> None:
    """Of few rows of each expert and of many, as near to the products of expanded weights as those are."""
    if method == "mxfp4":
        mxfp4_checkpoint(tmp_path)
    else:
        packed_checkpoint("qwen3_moe", method, tmp_path)
    model = build_meta(resolve_model(str(tmp_path)).config, "bfloat16").to_empty(device=GPU)
    generator = torch.Generator(GPU).manual_seed(0)
    (module, *_) = [each for each in model.modules() if is_experts(each)]
    fill_codes(module, generator)
    x = torch.randn(tokens, model.config.hidden_size, device=GPU, dtype=torch.bfloat16, generator=generator)
    weights, index = torch.rand(tokens, module.num_experts, device=GPU, generator=generator).topk(2)
    with torch.inference_mode():
        right = module(x, index, weights.bfloat16())
        assert use_experts_kernels(model, GPU, None)
        assert not expansions(module)
        assert close(module(x, index, weights.bfloat16()), right)


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "gpt_oss", "qwen3_next"])
def test_norms_are_those_of_transformers(name: str) -> None:
    model, ids = build_model(name).to(GPU, torch.bfloat16), torch.randint(1, 90, (3, 100), device=GPU)
    with torch.inference_mode():
        right = model(ids, use_cache=False).logits.float()
        use_norm_kernels(model, GPU)
        assert any(isinstance(getattr(m.forward, "__self__", None), NormByKernel) for m in model.modules())
        found = model(ids, use_cache=False).logits.float()
    assert close(found, right)


@pytest.mark.parametrize("bits", [4, 16])
def test_experts_are_captured_as_a_graph(bits: int) -> None:
    from zeroinf.engines.stream import expert_kernels as kernels
    from zeroinf.engines.stream.product_kernels import tile_for

    weight, kind = torch.randn(8, 64, 64, device=GPU, dtype=torch.bfloat16), CODES["int4"]
    matrix = WeightMatrix(weight, None, tuple(weight.shape), 16, 1)
    if bits == 4:
        codes = torch.randint(0, 256, (weight.numel() // 2,), device=GPU, dtype=torch.uint8)
        scales = torch.rand(weight.numel() // kind.group, device=GPU).bfloat16()
        matrix = WeightMatrix(codes, scales, tuple(weight.shape), kind.bits, kind.group)
        low = codes.view(-1, kind.group // 2).int()
        numbers = (torch.cat((low & 15, low >> 4), 1) - 8) * scales.float()[:, None]
        weight = numbers.bfloat16().view(weight.shape)
    x = torch.randn(50, 64, device=GPU, dtype=torch.bfloat16)
    index, tile = torch.rand(50, 8, device=GPU).topk(2).indices, tile_for(16, bits, GPU)

    def run() -> torch.Tensor:
        routing = kernels.route(index, 8, tile.rows)
        return kernels.product_by_expert(x, matrix, None, routing, 2, tile)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    index.copy_(torch.rand(50, 8, device=GPU).topk(2).indices)
    graph.replay()
    right = torch.einsum("toi,ti->to", weight[index.flatten()].float(), x.repeat_interleave(2, 0).float())
    assert close(out.float(), right)
