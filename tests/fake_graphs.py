"""CUDA graphs on the CPU: operators are noted while they are captured, and run again into the same tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class FakeCapture(TorchDispatchMode):  # type: ignore[misc]
    """Operators run while they are captured, into memory that is then full of NaN, as if they had not."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

        self._has_begun = False

    def begin(self) -> None:
        self._has_begun = True
        self.__enter__()

    def end(self) -> None:
        if self._has_begun:
            self._has_begun = False
            self.__exit__(None, None, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.nonzero.default:  # whose shape the host has to know
            raise RuntimeError("operation not permitted when stream is capturing")
        out = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self._calls:
            again = func(*args, **kwargs)
            if func._schema.is_mutable or not isinstance(again, torch.Tensor | tuple | list):
                continue
            for new, old in zip(_tensors(again), _tensors(out), strict=True):
                if new.data_ptr() != old.data_ptr():  # views are where they were
                    old.copy_(new)


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [each for each in value if isinstance(each, torch.Tensor)] if isinstance(value, tuple | list) else []


class FakeCapturing:
    def new(self) -> FakeCapture:
        return FakeCapture()

    def kept(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor
