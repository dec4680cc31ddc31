"""A kernel is used where it gives the bits that operators of torch give, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from zeroinf.model.quantized.fused import agrees


def codes(stack: int, rows: int, columns: int, generator: torch.Generator) -> tuple[Any, ...]:
    return torch.randint(-8, 8, (stack, rows, columns), generator=generator), 0.1


def in_torch(whole: torch.Tensor, numbers: torch.Tensor, scale: float) -> None:
    whole.copy_(numbers * scale)


def differs_once(whole: torch.Tensor, numbers: torch.Tensor, scale: float) -> None:
    in_torch(whole, numbers, scale)
    whole[-1, -1, -1] += 1


def fails(*ignored: Any) -> None:
    raise TypeError("no such kernel")


@pytest.mark.parametrize("like", [torch.empty(1, 2, 3), torch.empty(1, 3, 2, dtype=torch.bfloat16).mT])
def test_a_kernel_is_used_if_it_gives_the_same_bits(like: torch.Tensor) -> None:
    assert agrees(in_torch, in_torch, codes, like, torch.device("cpu"))
    with pytest.warns(UserWarning, match="by operators of torch, .*: results differ"):
        assert not agrees(differs_once, in_torch, codes, like, torch.device("cpu"))
    with pytest.warns(UserWarning, match="by operators of torch, .*: no such kernel"):
        assert not agrees(fails, in_torch, codes, like, torch.device("cpu"))
