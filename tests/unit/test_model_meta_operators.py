"""Operators on the meta device that are computed once for arguments of the same shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from zeroinf.model import meta_operators
from zeroinf.model.kv import ReadsAsZero

aten = torch.ops.aten


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


WIDE, COUNTS = meta(3, 4, 5), meta(3, 4, 5, dtype=torch.int64)
CALLS: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
    (aten.add.Tensor, (WIDE, meta(5)), {}),
    (aten.add.Tensor, (WIDE.transpose(0, 2), meta(5, 1, 1)), {"alpha": 2}),
    (aten.mul.Tensor, (COUNTS, 2), {}),
    (aten.mul.Tensor, (COUNTS, 2.0), {}),
    (aten.mul.Tensor, (COUNTS, True), {}),
    (aten.cat.default, ([WIDE, WIDE, meta(1, 4, 5)],), {}),
    (aten.mean.dim, (WIDE, [-1], True), {"dtype": torch.float32}),
    (aten.topk.default, (WIDE, 2), {}),
    (aten._to_copy.default, (WIDE.transpose(0, 1),), {"dtype": torch.float32}),
    (aten.bmm.default, (WIDE, meta(3, 5, 7)), {}),
]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: f"{call[0]}")
def test_what_comes_out_is_what_the_operator_returns(call: tuple[Any, tuple[Any, ...], dict[str, Any]]) -> None:
    func, args, kwargs = call
    for _ in range(2):
        right, found = func(*args, **kwargs), meta_operators.call(func, args, kwargs)
        rights, founds = ((right,), (found,)) if isinstance(right, torch.Tensor) else (right, found)
        for one, other in zip(rights, founds, strict=True):
            assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)
            assert other.device.type == "meta"


def test_sizes_that_depend_on_values_are_as_large_as_they_can_be() -> None:
    mask = meta(3, 4, dtype=torch.bool)
    with ReadsAsZero():
        assert mask.nonzero().shape == (12, 2)
        assert WIDE[mask].shape == (12, 5)
        assert WIDE.index_put((mask,), meta(12, 5)).shape == WIDE.shape
        assert [part.shape[1] for part in WIDE.split(COUNTS[:, 0, 0].tolist(), dim=1)] == [0, 0, 4]
        assert [part.shape[1] for part in WIDE.split([1, 3], dim=1)] == [1, 3]


def test_every_result_has_a_storage_of_its_own() -> None:
    one, other = (meta_operators.call(aten.neg.default, (WIDE,), {}) for _ in range(2))
    assert one.untyped_storage()._cdata != other.untyped_storage()._cdata


@pytest.mark.parametrize(
    ("func", "more"),
    [
        (aten.view.default, ([12, 5],)),
        (aten._unsafe_view.default, ([12, 5],)),
        (aten.slice.Tensor, (0, 1, 2)),
        (aten.neg_.default, ()),
    ],
)
def test_what_lies_in_an_argument_stays_there(func: Any, more: tuple[Any, ...]) -> None:
    for _ in range(2):
        found = meta_operators.call(func, (WIDE, *more), {})
        assert found.untyped_storage()._cdata == WIDE.untyped_storage()._cdata


def test_tensors_elsewhere_are_computed() -> None:
    found = meta_operators.call(aten.add.Tensor, (torch.ones(2), torch.ones(2)), {})
    assert found.tolist() == [2, 2]
    assert meta_operators.call(aten.add.Tensor, (torch.ones(2), torch.ones(2) * 2), {}).tolist() == [3, 3]


def test_a_dtype_that_nobody_names_is_the_default_one() -> None:
    before = torch.get_default_dtype()
    try:
        for dtype in (torch.float32, torch.float64):
            torch.set_default_dtype(dtype)
            assert meta_operators.call(aten.mul.Tensor, (COUNTS, 0.5), {}).dtype == dtype
    finally:
        torch.set_default_dtype(before)
