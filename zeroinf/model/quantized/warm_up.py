"""Compiles and tries the kernels that expand a model's quantized weights before the first pass needs them.

Triton compiles a kernel for each form of codes, and a form's first call compares its kernel with operators of torch.
The modules of a model on the meta device show with which shapes they will call which operators.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from zeroinf.compat.dispatch import TorchDispatchMode
from zeroinf.model.quantized.expansion import expansions, opened
from zeroinf.model.quantized.fused import OPERATORS


class _Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes each kind of call of the operators that have kernels, once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: dict[tuple[object, ...], tuple[str, tuple[Any, ...]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "zeroinf":
            name = func.name().partition("::")[2]
            self.found.setdefault((name, *map(_kind, args)), (name, tuple(args)))
        return func(*args, **(kwargs or {}))


def _kind(given: Any) -> object:
    if isinstance(given, torch.Tensor):
        return tuple(given.shape), given.stride(), given.dtype
    return given


def expansion_compilations(model: Any, device: torch.device) -> list[Callable[[], None]]:
    """Calls that each compile and try one kernel that `model`, which lies on the meta device, will use on `device`."""
    with torch.no_grad(), _Calls() as calls, opened(expansions(model)):
        pass
    return [partial(OPERATORS[name].compile, device, *args) for name, args in calls.found.values()]
