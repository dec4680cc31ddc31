"""Functions for rotary embeddings are known by what they compute; by the kernel they compute the same."""

from __future__ import annotations

import importlib.util
import os
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from small_models import build_model
from torch.nn import Module

from zeroinf.engines.stream.rotary import Rotary, RotaryForm, find_rotary, rotating, turn

WIDTH = 16


def function_of(model: Module) -> Any:
    """What modules of `model` call."""
    names = {type(module).__module__ for module in model.modules()}
    (found,) = {vars(sys.modules[name])["apply_rotary_pos_emb"] for name in names if "modeling" in name}
    return found


def asked(turned: int, table: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    q, k = (torch.randn(1, 5, heads, WIDTH).to(dtype).transpose(1, 2) for heads in (4, 2))
    angles = torch.randn(1, 5, turned // 2).repeat(1, 1, 2 * table // turned)
    return [q, k, angles.cos().to(dtype), angles.sin().to(dtype)]


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("llama", RotaryForm(halves=False, partly=False)),
        ("gpt_neox", RotaryForm(halves=False, partly=True)),
        ("gpt_oss", RotaryForm(halves=True, partly=False)),
    ],
)
def test_functions_of_models_are_found(name: str, form: RotaryForm) -> None:
    model = build_model(name)
    assert find_rotary(model)
    assert find_rotary(model)  # once more
    found = function_of(model)
    assert isinstance(found, Rotary)
    assert found._form == form
    assert not isinstance(found._function, Rotary)


@pytest.mark.parametrize("name", ["gpt2", "cohere"])
def test_what_computes_something_else_is_left_alone(name: str) -> None:
    """GPT-2 has no such embeddings; Cohere turns neighbouring columns."""
    assert not find_rotary(build_model(name))


class Calls:
    """A kernel that computes in torch, and counts."""

    def __init__(self) -> None:
        self.turned: list[int] = []

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, turned: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.turned.append(turned)
        return turn(q, cos, sin, turned), turn(k, cos, sin, turned)


def test_tokens_are_those_of_the_models_function() -> None:
    model, calls = build_model("gpt_neox"), Calls()
    tokens = torch.randint(3, 90, (1, 9))
    with torch.no_grad():
        right = model(tokens).logits
        find_rotary(model)
        assert torch.equal(model(tokens).logits, right)
        assert not calls.turned
        with rotating(calls):
            assert torch.equal(model(tokens).logits, right)
    assert len(calls.turned) == len(model.gpt_neox.layers)


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, cos, sin: (q, k, cos.double(), sin.double()),
        lambda q, k, cos, sin: (q.expand(2, -1, -1, -1), k.expand(2, -1, -1, -1), cos, sin),
        lambda q, k, cos, sin: (q, k, cos[..., :6], sin[..., :6]),
        lambda q, k, cos, sin: (q, k, cos[:, :1], sin[:, :1]),
        lambda q, k, cos, sin: (q.mT.contiguous().mT, k, cos, sin),
    ],
)
def test_inputs_that_do_not_suit_the_kernel_go_the_functions_way(change: Any) -> None:
    given, calls, seen = change(*asked(WIDTH, WIDTH)), Calls(), []
    rotary = Rotary(lambda *inputs: seen.append(inputs), RotaryForm(halves=False, partly=False))
    with rotating(calls):
        rotary(*given)
    assert not calls.turned
    assert len(seen) == 1


def test_a_call_that_turns_one_tensor_alone_goes_the_functions_way() -> None:
    q, _, cos, sin = asked(WIDTH, WIDTH)
    calls, seen = Calls(), []
    rotary = Rotary(lambda *inputs, **named: seen.append((inputs, named)), RotaryForm(halves=False, partly=False))
    with rotating(calls):
        rotary(q, cos=cos, sin=sin, unsqueeze_dim=2)
    assert not calls.turned
    assert seen == [((q,), {"cos": cos, "sin": sin, "unsqueeze_dim": 2})]


def test_a_module_of_another_kind_with_such_a_name_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("modeling_of_nobody")
    module.apply_rotary_pos_emb = lambda q, k, cos, sin: (q * cos[:, None], k * cos[:, None])  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "modeling_of_nobody", module)
    own = type("Own", (Module,), {"__module__": "modeling_of_nobody"})
    assert not find_rotary(own())


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None,
    reason="needs TRITON_INTERPRET=1 and Triton",
)
@pytest.mark.parametrize(("turned", "table"), [(16, 16), (16, 8), (6, 6), (6, 3)])
def test_the_kernel_turns_bit_by_bit_as_torch_does(turned: int, table: int) -> None:
    """In float16: Triton's interpreter rounds to bfloat16 by cutting."""
    from zeroinf.engines.stream.rotary_kernels import rotate

    q, k, cos, sin = asked(turned, table, torch.float16)
    for x, found in zip((q, k), rotate(q, k, cos, sin, turned), strict=True):
        assert torch.equal(found, turn(x, cos, sin, turned))
        assert found.stride() == x.stride()
