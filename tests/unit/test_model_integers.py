"""Integer codes are expanded to (code - zero point) * scale, whatever holds them."""

from __future__ import annotations

import torch

from zeroinf.model.quantized.integers import expand_integers


def test_zero_points_in_bytes_are_above_and_below_zero() -> None:
    codes = torch.randint(-128, 128, (2, 6, 32), dtype=torch.int8)
    zeros = torch.tensor([-128, -3, 0, 5, 127, 1], dtype=torch.int8).expand(2, 6)[..., None]
    scales, found = torch.rand(2, 6, 1), torch.empty(2, 6, 32)
    expand_integers(found, codes, scales, zeros.contiguous())
    assert torch.equal(found, (codes.float() - zeros.float()) * scales)


def test_groups_of_any_size_are_expanded() -> None:
    codes, scales, found = torch.randint(-8, 8, (5, 12), dtype=torch.int8), torch.rand(5, 4), torch.empty(5, 12)
    expand_integers(found, codes, scales)
    assert torch.equal(found, codes.float() * scales.repeat_interleave(3, dim=1))
