"""Makes tensors of a class that holds no memory, and finds such tensors among the arguments of an operator.

Relies on `torch.Tensor._make_wrapper_subclass` (since torch 1.9), `torch.utils._pytree.tree_map_only` (since torch 2.0)
and `torch._C.DisableTorchFunctionSubclass` (since torch 2.0), all of which torch's notes on subclasses use. Without
them, weights could not stand in modules as codes. `tests/unit/test_compat.py` fails when they change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch.utils._pytree import tree_map_only

_Tensor = TypeVar("_Tensor", bound=torch.Tensor)


def make_wrapper(kind: type[_Tensor], shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> _Tensor:
    """A tensor of the class `kind` with these properties, and no memory behind it."""
    made: _Tensor = torch.Tensor._make_wrapper_subclass(kind, shape, dtype=dtype, device=device)
    return made


def as_plain_tensors() -> AbstractContextManager[None]:
    """While it lasts, functions of torch do not ask `__torch_function__` of such classes."""
    held: AbstractContextManager[None] = torch._C.DisableTorchFunctionSubclass()
    return held


def replaced(kind: type[_Tensor], change: Callable[[_Tensor], Any], values: Any) -> Any:
    """`values`, nested in lists, tuples and dictionaries, with `change` applied to those of the class `kind`."""
    return tree_map_only(kind, change, values)
