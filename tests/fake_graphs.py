"""CUDA graphs on the CPU, as strict as those of a GPU.

What is captured does not run. Replays read and write the tensors that were there at the capture. What lies in the
graphs' memory pool is lost as soon as another layer is replayed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from zeroinf.generation.graphs import Capture

aten = torch.ops.aten
_WAITING = {aten.nonzero, aten._local_scalar_dense, aten.masked_select, aten._unique2, aten.unique_consecutive}
"""Operators whose result the host has to know."""


def waits(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether the GPU's kernel of `func` waits for the GPU, so that it cannot be captured."""
    if func.overloadpacket in _WAITING or "grouped_mm_fallback" in str(func):
        return True
    if func.overloadpacket is aten._grouped_mm:
        return args[0].dtype != torch.bfloat16
    if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_):
        return any(index is not None and index.dtype == torch.bool for index in args[1])
    return False


class _Watching(TorchDispatchMode):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.is_on = True

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if self.is_on and waits(func, args):
            self.found.append("a layer waits for the GPU")
        return func(*args, **(kwargs or {}))


class FakeCapturing:
    """`misses`: waits are not noted, so that captures fail."""

    def __init__(self, *, misses: bool = False) -> None:
        self._misses = misses
        self._watching: list[_Watching] = []
        self.made: list[_FakeCapture] = []
        self.failed = 0

    def new(self) -> Capture:
        self.made.append(_FakeCapture(self, is_first=len(self.made) % 2 == 0))
        return self.made[-1]

    @contextmanager
    def watching(self) -> Iterator[list[str]]:
        mode = _Watching()
        mode.is_on = not self._misses
        self._watching.append(mode)
        try:
            with mode:
                yield mode.found
        finally:
            self._watching.pop()

    @contextmanager
    def unwatched(self) -> Iterator[None]:
        mode = self._watching[-1]
        before, mode.is_on = mode.is_on, False
        try:
            yield
        finally:
            mode.is_on = before

    def forget(self) -> None:
        """Lose what lies in the pool."""
        for capture in self.made:
            capture.forget()


class _FakeCapture(TorchDispatchMode):  # type: ignore[misc]
    def __init__(self, capturing: FakeCapturing, *, is_first: bool) -> None:
        """is_first: of the two parts of a layer, which are captured one after the other."""
        super().__init__()
        self._capturing, self._is_first = capturing, is_first
        self._calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self._pool: list[torch.Tensor] = []
        self._has_begun = self._has_failed = False

    def begin(self) -> None:
        self._has_begun = True
        self.__enter__()

    def end(self) -> None:
        if not self._has_begun:
            return
        self._has_begun = False
        self.__exit__(None, None, None)
        if self._has_failed:
            self._capturing.failed += 1
            raise RuntimeError("operation failed due to a previous error during capture")
        self.forget()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if waits(func, args):
            self._has_failed = True
            raise RuntimeError("operation not permitted when stream is capturing")
        kwargs = kwargs or {}
        if func._schema.is_mutable and not func._schema.name.endswith("_out"):
            out = args[0]  # nothing runs now
        else:
            out = func(*args, **kwargs)
            given = {each.untyped_storage().data_ptr() for each in _tensors([*args, *kwargs.values()])}
            self._pool += [each for each in _tensors(out) if each.untyped_storage().data_ptr() not in given]
        self._calls.append((func, _as_now(args), _as_now(kwargs), out))
        return out

    def forget(self) -> None:
        for each in self._pool:
            with torch.inference_mode() if each.is_inference() else nullcontext():
                each.fill_(float("nan") if each.dtype.is_floating_point else 0)

    def replay(self) -> None:
        if self._is_first:
            self._capturing.forget()
        for func, args, kwargs, out in self._calls:
            again = func(*args, **kwargs)
            if func._schema.is_mutable:
                continue
            for new, old in zip(_tensors(again), _tensors(out), strict=True):
                if new.data_ptr() != old.data_ptr():  # views are where they were
                    old.copy_(new)
        if not self._is_first:
            self._capturing.forget()


def _as_now(value: Any) -> Any:
    """Tensors that stay where they are now, whatever memory a parameter is given later."""
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, dict):
        return {name: _as_now(each) for name, each in value.items()}
    return type(value)(map(_as_now, value)) if isinstance(value, tuple | list) else value


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [inner for each in value for inner in _tensors(each)] if isinstance(value, tuple | list) else []
