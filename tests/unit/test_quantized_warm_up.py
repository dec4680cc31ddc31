"""Kernels that expand a model's weights are tried and compiled, for its shapes, before they are used."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_models import small_config

from zeroinf.engines.stream import experts
from zeroinf.model.inspect import build_meta, read_anatomy
from zeroinf.model.quantized import fp4  # noqa: F401  has an operator
from zeroinf.model.quantized.fused import OPERATORS, Fused
from zeroinf.model.quantized.warm_up import expansion_compilations

CPU = torch.device("cpu")


def gpt_oss() -> Any:
    config = small_config("gpt_oss")
    config.quantization_config = {"quant_method": "mxfp4"}
    return build_meta(config, "bfloat16")


def given_to_kernels(monkeypatch: pytest.MonkeyPatch, change: Callable[[torch.Tensor], object]) -> list[torch.Tensor]:
    """The tensors that a stand-in for the kernel of MXFP4 is asked to fill; it changes what torch fills them with."""
    operator, found = torch.ops.zeroinf.expand_fp4, list[torch.Tensor]()

    def expand_fp4(whole: torch.Tensor, *args: Any) -> None:
        found.append(whole)
        operator(whole, *args)
        if not whole.is_meta:
            change(whole)

    kernels = SimpleNamespace(expand_fp4=expand_fp4)
    monkeypatch.setitem(sys.modules, "zeroinf.model.quantized.expansion_kernels", kernels)
    monkeypatch.setattr("zeroinf.model.quantized.expansion_kernels", kernels, raising=False)
    untried = Fused("expand_fp4", operator, OPERATORS["expand_fp4"].like)
    monkeypatch.setitem(OPERATORS, "expand_fp4", untried)
    return found


def test_a_kernel_is_tried_once_and_compiled_for_each_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    found, model = given_to_kernels(monkeypatch, lambda whole: None), gpt_oss()
    for compile_one in expansion_compilations(model, CPU):
        compile_one()
    tried, compiled = ([whole for whole in found if whole.is_meta is is_meta] for is_meta in (False, True))
    assert {whole.dtype for whole in tried} == {torch.bfloat16}
    assert len(tried) == 2  # once compiled, and once known
    experts, hidden, inner = model.config.num_local_experts, model.config.hidden_size, model.config.intermediate_size
    assert {tuple(whole.shape) for whole in compiled} == {(experts, 2 * inner, hidden), (experts, hidden, inner)}
    assert len(compiled) == 2  # though there are more layers


def test_a_kernel_that_gives_other_bits_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    found = given_to_kernels(monkeypatch, lambda whole: whole.add_(1))
    with pytest.warns(UserWarning, match="by operators of torch"):
        for compile_one in expansion_compilations(gpt_oss(), CPU):
            compile_one()
    assert [whole.is_meta for whole in found] == [False]


@pytest.mark.parametrize("is_quantized", [True, False])
def test_products_of_experts_are_compiled_for_weights_as_they_lie(
    is_quantized: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of MXFP4's codes are rows of the products: expanded, they lie in order, though the model has columns so."""
    monkeypatch.setattr(experts, "expert_products", lambda *_: True)
    config = small_config("gpt_oss")
    if is_quantized:
        config.quantization_config = {"quant_method": "mxfp4"}
    model, anatomy = build_meta(config, "bfloat16"), read_anatomy(config, dtype="bfloat16")
    compiled: list[tuple[Any, ...]] = []
    monkeypatch.setattr(experts, "_compile_product", lambda *given: compiled.append(given))
    for compile_one in experts.expert_compilations(model, anatomy, "model", CPU):
        compile_one()
    found = {(weight.shape, bias.shape[1], each, weight.data.stride(-1) == 1) for weight, bias, each, *_ in compiled}
    count, hidden, inner = config.num_local_experts, config.hidden_size, config.intermediate_size
    of_each = config.num_experts_per_tok
    assert found == {
        ((count, 2 * inner, hidden), 2 * inner, of_each, is_quantized),
        ((count, hidden, inner), hidden, 1, is_quantized),
    }
    assert len(compiled) == 2  # though there are more layers


def test_a_model_in_full_has_nothing_to_compile() -> None:
    assert not expansion_compilations(build_meta(small_config("llama"), "bfloat16"), CPU)
