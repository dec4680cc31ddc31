"""Rotary positions: a model's function is known by what it computes; by the kernel it computes the same bits."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from small_models import build_model

from zeroinf.compat.rotary import replace_rotation, rotations_of
from zeroinf.engines.stream.rotary import Rotation, by_halves, rotating_on_meta, use_rotary_kernels

CPU = torch.device("cpu")


@pytest.mark.parametrize(("name", "is_replaced"), [("qwen3", True), ("cohere", False), ("gptj", False)])
def test_functions_of_models_are_replaced_where_they_compute_the_same(name: str, is_replaced: bool) -> None:
    model, ids = build_model(name), torch.arange(5)[None]
    before = dict(rotations_of(model))
    right = model(ids).logits
    try:
        use_rotary_kernels(model, CPU)
        assert {isinstance(rotate, Rotation) for _, rotate in rotations_of(model)} == {is_replaced}
        assert torch.equal(model(ids).logits, right)
        with rotating_on_meta(lambda *args: pytest.fail("on a CPU")):
            model(ids)
    finally:
        for module, rotate in before.items():
            replace_rotation(module, rotate)


def test_meta_tensors_rotate_as_they_are_told_to() -> None:
    seen = []
    rotation = Rotation(by_halves)
    q, k, cos = (torch.empty(shape, device="meta") for shape in ((1, 4, 3, 8), (1, 2, 3, 8), (1, 3, 8)))
    rotation(q, k, cos, cos)
    with rotating_on_meta(lambda *args: seen.append(args) or (q, k)):
        rotation(q, k, cos, cos)
    assert len(seen) == 1


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None,
    reason="needs TRITON_INTERPRET=1 and Triton",
)
@pytest.mark.parametrize("width", [8, 80])
@pytest.mark.parametrize("batch", [1, 2])
def test_the_kernel_rotates_to_the_bit(width: int, batch: int) -> None:
    from zeroinf.engines.stream.rotary_kernels import rotate

    q, k = (torch.randn(batch, 3, heads, width).transpose(1, 2) for heads in (5, 2))
    cos, sin = torch.randn(1, 3, width), torch.randn(1, 3, width)
    for found, right in zip(rotate(q, k, cos, sin), by_halves(q, k, cos, sin), strict=True):
        assert torch.equal(found, right)
