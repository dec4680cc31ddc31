"""Gives access to torch's dispatcher: operators as a dispatch mode sees them, and the storages behind tensors.

Relies on `torch.utils._python_dispatch.TorchDispatchMode` (since torch 1.13; documented, in a private module) and its
`_should_skip_dynamo` (a mode works without, and takes longer), on `_schema` and `_overloadpacket` of operators (since
torch 1.11), on `_cdata` of storages, on the table of formulas `flop_registry` (since torch 2.1), and on the private
operators of aten that are named below. Planning records what a model allocates and computes by them; without them there
would be no plans. `tests/unit/test_compat.py` fails when they change.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _python_dispatch
from torch.utils.flop_counter import flop_registry

__all__ = [
    "GROUPED_MM",
    "IS_ALL_TRUE",
    "LOCAL_SCALAR",
    "SAFE_SOFTMAX",
    "TO_COPY",
    "UNSAFE_VIEW",
    "TorchDispatchMode",
    "flop_registry",
    "is_view",
    "operator_of",
    "schema_of",
    "storage_id",
]

LOCAL_SCALAR = torch.ops.aten._local_scalar_dense.default
"""What `Tensor.item` calls."""
IS_ALL_TRUE = torch.ops.aten._is_all_true.default
"""What checks of values call, such as those of distributions."""
TO_COPY = torch.ops.aten._to_copy.default
"""What `Tensor.to` calls where it copies."""
SAFE_SOFTMAX = torch.ops.aten._safe_softmax.default
"""The softmax of attention that is computed by its mathematics (since torch 2.5)."""
UNSAFE_VIEW = torch.ops.aten._unsafe_view.default
"""What products end with; it returns what it is given."""
GROUPED_MM = torch.ops.aten._grouped_mm
"""A product of rows with the weights of their group (since torch 2.8)."""


class TorchDispatchMode(_python_dispatch.TorchDispatchMode):  # type: ignore[no-untyped-call]
    """torch's mode, whose `__torch_dispatch__` is called as it is: torch wraps it in a function that keeps its compiler
    away, which takes as long as all that a mode does, and nothing is compiled while one of ours is active."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


def operator_of(func: Any) -> Any:
    """The operator, such as `aten.add`, of which `func`, such as `aten.add.Tensor`, is one form."""
    return func._overloadpacket


def is_view(func: Any) -> bool:
    """Whether `func` returns another view of what it is given, and computes nothing. Relies on `OpOverload.is_view`."""
    return bool(func.is_view)


def schema_of(func: Any) -> Any:
    """The schema of `func`: its arguments and returned values, and which of them it changes."""
    return func._schema


def storage_id(tensor: torch.Tensor) -> int:
    """A number that tensors share which lie in one storage, as long as it lives."""
    return int(tensor.untyped_storage()._cdata)
