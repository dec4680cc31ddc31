"""Products on codes on a GPU: what they give in bfloat16 is within rounding of products with expanded weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import build_model

from zeroinf.engines.stream import expand as expand_module
from zeroinf.engines.stream.coded_weight import CodedWeight
from zeroinf.engines.stream.expand import Expander
from zeroinf.engines.stream.experts import use_experts_kernels
from zeroinf.engines.stream.tensor_groups import group_tensors
from zeroinf.model.inspect import find_stacks
from zeroinf.planner.wire import Wire

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda", 0)


def logits(model: Any, wire: Wire, ids: torch.Tensor, expected: bool) -> torch.Tensor:
    """Of `model`, whose layers compute from pieces; whether products are `expected` to run on codes."""
    groups, _ = group_tensors(model, wire)
    expander = Expander(groups, GPU)
    assert expander.multiplies_codes == expected
    if expected:
        use_experts_kernels(model)
    layers = [layer for _, stack in find_stacks(model) for layer in stack]
    hooks = []
    for group, layer in zip(groups, layers, strict=True):
        piece = torch.zeros(group.nbytes, dtype=torch.uint8)
        for tensor, target in group.targets(piece, torch.device("cpu")):
            target.write(tensor.value.detach().cpu())
        moved = piece.to(GPU)
        for tensor, stands_for_it in expander.views(group):
            assert not isinstance(stands_for_it, CodedWeight) or expected
            tensor.bind(stands_for_it)
        hooks.append(layer.register_forward_pre_hook(lambda *_, g=group, p=moved: expander.expand(g, p)))
    with torch.inference_mode():
        found: torch.Tensor = model(ids, use_cache=False).logits.float()
    for hook in hooks:
        hook.remove()
    for group in groups:
        for tensor in group.tensors:
            tensor.bind(tensor.value)
    return found


@pytest.mark.parametrize("wire", ["int4", "int8"])
@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen3_moe", "gpt2"])
@pytest.mark.parametrize("tokens", [3, 90, 700])
def test_logits_are_those_of_expanded_weights(
    name: str, wire: Wire, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model(name).to(GPU, torch.bfloat16)
    ids = torch.randint(1, 90, (1, tokens), generator=torch.Generator().manual_seed(tokens)).to(GPU)
    found = logits(model, wire, ids, expected=True)
    with monkeypatch.context() as patch:
        patch.setattr(expand_module, "product_on_codes", lambda device, groups: None)
        right = logits(build_model(name).to(GPU, torch.bfloat16), wire, ids, expected=False)
    assert (found - right).norm() < 0.015 * right.norm()


def test_experts_are_captured_as_a_graph() -> None:
    from zeroinf.engines.stream import product_kernels as kernels
    from zeroinf.engines.stream.coded_weight import Matrix

    weight = torch.randn(8, 64, 64, device=GPU, dtype=torch.bfloat16)
    matrix = Matrix(weight, None, tuple(weight.shape), 16, 1)
    x, scores = torch.randn(50, 64, device=GPU, dtype=torch.bfloat16), torch.rand(50, 8, device=GPU)
    index, tile = scores.topk(2).indices, kernels.tile_for(16, 16)

    def run() -> torch.Tensor:
        routing = kernels.route(index, 8, tile.rows)
        return kernels.product_by_expert(x, matrix, None, routing, 2, tile)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    index.copy_(torch.rand(50, 8, device=GPU).topk(2).indices)
    graph.replay()
    right = torch.einsum("toi,ti->to", weight[index.flatten()].float(), x.repeat_interleave(2, 0).float())
    assert (out.float() - right).norm() < 0.01 * right.norm()
