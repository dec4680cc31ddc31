"""RMS norms are known by what they compute; by the kernel they compute the same."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
import torch
from small_models import build_model
from torch.nn import Module, Parameter

from zeroinf.engines.stream.norms import NormByKernel, NormForm, norms_of


class Norm(Module):
    """The form that Llama's norms have, by a name that says nothing."""

    def __init__(self, width: int, eps: float = 1e-3) -> None:
        super().__init__()
        self.weight, self.eps = Parameter(torch.rand(width)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value = x.float()
        value = value * torch.rsqrt(value.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * value.to(x.dtype)


class Centered(Norm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x - x.mean(-1, keepdim=True))


class Gated(Norm):
    def forward(self, x: torch.Tensor, gate: Any = None) -> torch.Tensor:
        return super().forward(x) if gate is None else super().forward(x) * gate


class OtherEps(Norm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.eps, before = 1e-5, self.eps
        found = super().forward(x)
        self.eps = before
        return found


@pytest.mark.parametrize(
    ("name", "count", "form"),
    [
        ("qwen3", 13, NormForm(1e-6, rounds_first=True, adds_one=False)),
        ("gemma2", 13, NormForm(1e-6, rounds_first=False, adds_one=True)),
        ("gpt_oss", 7, NormForm(1e-5, rounds_first=False, adds_one=False)),
        ("gpt2", 0, None),
    ],
)
def test_norms_of_models_are_found(name: str, count: int, form: NormForm | None) -> None:
    found = list(norms_of(build_model(name)))
    assert len(found) == count
    assert {own for _, own in found} == ({form} if form else set())


def test_what_computes_something_else_is_left_alone() -> None:
    found = list(norms_of(torch.nn.ModuleList([Norm(8), Centered(8), Gated(8), OtherEps(8), torch.nn.LayerNorm(8)])))
    assert [type(module) for module, _ in found] == [Norm]


def test_inputs_that_do_not_suit_the_kernel_go_the_modules_way() -> None:
    norm, calls = Norm(8), []

    def kernel(x: torch.Tensor, weight: torch.Tensor, eps: float, **form: bool) -> torch.Tensor:
        calls.append(x.shape)
        return NormForm(eps, **form).compute(x, weight)

    ((_, form),) = norms_of(torch.nn.Sequential(norm))
    x = torch.randn(3, 8)
    right = norm(x)
    NormByKernel(norm, form, kernel)
    assert torch.equal(norm(x), right)
    assert torch.equal(norm(torch.cat((x, x), 1)[:, :8]), right)
    assert norm(x.bfloat16()).dtype == torch.float32  # as a weight in float32 has it
    assert calls == [(3, 8)]


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None,
    reason="needs TRITON_INTERPRET=1 and Triton",
)
@pytest.mark.parametrize("width", [48, 3000])
def test_the_kernel_computes_each_form(width: int) -> None:
    from zeroinf.engines.stream.norm_kernels import rms_norm

    x, weight = torch.randn(5, 7, width), torch.randn(width)
    for form in (NormForm(1e-3, first, one) for first in (True, False) for one in (False, True)):
        found = rms_norm(x, weight, form.eps, rounds_first=form.rounds_first, adds_one=form.adds_one)
        assert torch.allclose(found, form.compute(x, weight), rtol=1e-4, atol=1e-5)
