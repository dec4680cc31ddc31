"""Weights that rest as codes: a model computes with them what it computes with the weights that they stand for."""

from __future__ import annotations

import pytest
import torch
from small_models import build_model
from wire_reference import through_codes

from zeroinf.engines.stream.coded_weight import CodedWeight, WeightMatrix
from zeroinf.engines.stream.expand import Expander
from zeroinf.engines.stream.tensor_groups import TensorGroup, group_tensors
from zeroinf.planner.wire import CODES, MOST_CODED_ROWS, Wire

CPU = torch.device("cpu")


class Multiplier:
    """Multiplies by codes, by way of a decoder of its own, and counts."""

    calls = 0

    def __call__(self, x: torch.Tensor, matrix: WeightMatrix, bias: torch.Tensor | None) -> torch.Tensor:
        self.calls += 1
        assert matrix.scales is not None
        codes = matrix.data.view(-1, matrix.group * matrix.bits // 8).int()
        values = torch.cat((codes & 15, codes >> 4), 1) - 8 if matrix.bits == 4 else codes - 128
        weight = (values * matrix.scales.float()[:, None]).view(matrix.shape).to(x.dtype)
        return torch.nn.functional.linear(x, weight, bias)


def piece_of(group: TensorGroup) -> torch.Tensor:
    piece = torch.zeros(group.nbytes, dtype=torch.uint8)
    for tensor, target in group.targets(piece, CPU):
        target.write(tensor.value.detach())
    return piece


@pytest.mark.parametrize("wire", CODES)
@pytest.mark.parametrize("share_a_place", [False, True])
@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2", "mamba"])
def test_models_compute_with_codes_what_they_compute_with_weights(name: str, wire: Wire, share_a_place: bool) -> None:
    multiplier, model, ids = Multiplier(), build_model(name), torch.arange(1, 8)[None]
    groups, *_ = group_tensors(model, wire)
    passing = {name for group in groups for tensor in group.tensors for name in tensor.names} if share_a_place else ()
    expander = Expander(groups, CPU, multiplier, passing)
    assert (expander.slot.numel() < max(group.layout.nbytes for group in groups)) == share_a_place
    pieces, expanded = [piece_of(group) for group in groups], [expander.on(group) for group in groups]
    for own in expanded:
        for tensor, stands_for_it in own.views:
            if isinstance(stands_for_it, CodedWeight):
                tensor.value.data.copy_(through_codes(tensor.value.detach(), wire))
    with torch.inference_mode():
        right = model(ids, use_cache=False).logits
        for own, piece, block in zip(expanded, pieces, blocks_of(model), strict=True):
            for tensor, stands_for_it in own.views:
                tensor.bind(stands_for_it)
            block.register_forward_pre_hook(lambda *_, own=own, p=piece: own.fill(p))
        found = model(ids, use_cache=False).logits
    assert torch.allclose(found, right, atol=1e-5, rtol=1e-4)
    assert (multiplier.calls > 0) == (name != "gpt2")  # whose weights lie transposed, and are expanded


def blocks_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    from zeroinf.model.inspect import find_stacks

    return [layer for _, layers in find_stacks(model) for layer in layers]


def test_a_weight_stands_for_the_piece_that_it_was_handed_last() -> None:
    multiplier, (groups, *_) = Multiplier(), group_tensors(build_model("llama"), "int4")
    group = groups[0]
    expanded = Expander(groups, CPU, multiplier).on(group)
    (weight,) = [view for tensor, view in expanded.views if tensor.names[0].endswith("q_proj.weight")]
    assert isinstance(weight, CodedWeight)
    x, found, before = torch.randn(3, weight.shape[1]), [], weight.location.offset // weight.dtype.itemsize // 2
    for seed in (1, 2):
        piece = piece_of(group)
        codes = group.layout.codes(piece)
        codes.copy_(torch.randint(0, 256, codes.shape, generator=torch.Generator().manual_seed(seed)).byte())
        expanded.fill(piece)
        product = torch.nn.functional.linear(x, weight)
        assert torch.allclose(product, x @ weight.mT, atol=1e-5)  # which reads it in full
        assert weight.data_ptr() == group.layout.codes(piece).data_ptr() + before
        found.append(product)
    assert not torch.allclose(found[0], found[1])
    assert multiplier.calls == 2


def test_many_rows_are_multiplied_in_full() -> None:
    multiplier, (groups, *_) = Multiplier(), group_tensors(build_model("llama"), "int4")
    expanded = Expander(groups, CPU, multiplier).on(groups[0])
    expanded.fill(piece_of(groups[0]))
    weight = next(view for _, view in expanded.views if isinstance(view, CodedWeight))
    torch.nn.functional.linear(torch.randn(MOST_CODED_ROWS[4] + 1, weight.shape[1]), weight)
    assert multiplier.calls == 0
