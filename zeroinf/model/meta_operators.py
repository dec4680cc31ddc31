"""Runs operators on the meta device, computing each result once for arguments of the same shapes.

Torch computes the shapes of most results in Python, in a quarter of a millisecond, and the blocks of a model need the
same ones repeatedly. Results depend on shapes, strides and dtypes only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch.nn import Parameter

from zeroinf.compat.dispatch import IS_ALL_TRUE, LOCAL_SCALAR, TO_COPY, schema_of, storage_id

_REMEMBERED = 1 << 16
_SPLIT = torch.ops.aten.split_with_sizes.default
_NONZERO = torch.ops.aten.nonzero.default
_SIZED_BY_VALUES = {
    *(_SPLIT, _NONZERO, torch.ops.aten.index.Tensor),
    *(torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default),
}
_PLAIN = {torch.Tensor, Parameter}
_LISTS = {list, tuple, torch.Size}
_CONSTANTS = {type(None), bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format}


class _Like(NamedTuple):
    """A tensor on the meta device, as far as results depend on it."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    def make(self) -> torch.Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")


class _Constant(NamedTuple):
    """1, 1.0 and True are equal, and make results of different types."""

    kind: type
    value: Any

    def make(self) -> Any:
        return self.value


class _UnlikeError(Exception):
    """An argument is something else."""


def values(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What the operator `func` gives that asks for values of a tensor on the meta device, for Python or on the host:
    zeros, and that checks of values hold. None for operators that do not."""
    if not args or not isinstance(args[0], torch.Tensor) or args[0].device.type != "meta":
        return None
    if func is LOCAL_SCALAR:
        return torch.zeros((), dtype=args[0].dtype, device="cpu").item()
    if func is IS_ALL_TRUE:
        return torch.ones((), dtype=torch.bool, device="cpu")
    device = kwargs.get("device") if func is TO_COPY else None
    if device is not None and torch.device(device).type == "cpu":
        return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device="cpu")
    return None


def call(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call torch's operator `func`; where its results are new tensors on the meta device, each has a storage
    of its own. Sizes that depend on values are as large as they can be: `nonzero` and masks find all elements, and a
    split by sizes that were read as zeros gives everything to the last part."""
    if func in _SIZED_BY_VALUES and args[0].device.type == "meta":
        args = _at_the_most(func, args)
        if func is _NONZERO:
            return args[0]
    if _makes_new(func):
        try:
            given = _frozen(args), tuple((name, _frozen(value)) for name, value in kwargs.items())
        except _UnlikeError:
            return func(*args, **kwargs)
        made = _made(func, *given, torch.get_default_dtype())
        if made is not None:
            return _thawed(made)
    return func(*args, **kwargs)


def _at_the_most(func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments with which the result has the largest size that it can have; of `nonzero` that result."""
    tensor, *more = args
    if func is _NONZERO:
        return (_found(tensor),)
    if func is _SPLIT:
        sizes, *where = more
        return args if any(sizes) else (tensor, [*sizes[:-1], tensor.shape[where[0] if where else 0]], *where)
    indices, *values = more
    found: list[torch.Tensor | None] = []
    for index in indices:
        found += _found(index).unbind(1) if index is not None and index.dtype == torch.bool else [index]
    return tensor, found, *values


def _found(mask: torch.Tensor) -> torch.Tensor:
    return torch.empty(mask.numel(), mask.dim(), dtype=torch.int64, device="meta")


@cache
def _makes_new(func: Any) -> bool:
    """Whether `func` does nothing but return tensors that share nothing with its arguments."""
    schema = schema_of(func)
    returned = [(str(one.type), one.alias_info) for one in schema.returns]
    return not schema.is_mutable and bool(returned) and all(one == ("Tensor", None) for one in returned)


@lru_cache(maxsize=_REMEMBERED)
def _made(func: Any, args: Any, kwargs: Any, default_dtype: torch.dtype) -> Any:
    """The result of `func` for such arguments; None where it is anything but new tensors on the meta device."""
    given = _thawed(args), {name: _thawed(value) for name, value in kwargs}
    out = func(*given[0], **given[1])
    taken = {storage_id(tensor) for tensor in _tensors((*given[0], *given[1].values()))}
    found = [_like(one, taken) for one in ((out,) if isinstance(out, torch.Tensor) else out)]
    if None in found:
        return None
    return found[0] if isinstance(out, torch.Tensor) else tuple(found)


def _like(tensor: torch.Tensor, taken: set[int]) -> _Like | None:
    """None for a tensor that is not all of its storage, lies elsewhere or in one that is `taken`: no schema tells that
    `_unsafe_view` returns what it is given."""
    storage, like = tensor.untyped_storage(), _Like(tensor.shape, tensor.stride(), tensor.dtype)
    is_whole = tensor.device.type == "meta" and storage.nbytes() == like.make().untyped_storage().nbytes()
    return like if is_whole and storage_id(tensor) not in taken else None


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from _tensors(value)


def _frozen(value: Any) -> Any:
    kind = type(value)
    if kind in _PLAIN:
        if value.device.type != "meta" or value.layout != torch.strided:
            raise _UnlikeError
        return _Like(value.shape, value.stride(), value.dtype)
    if kind in _LISTS:
        return tuple([_frozen(one) for one in value])
    if kind in _CONSTANTS:
        return _Constant(kind, value)
    raise _UnlikeError


def _thawed(value: Any) -> Any:
    return tuple([_thawed(one) for one in value]) if type(value) is tuple else value.make()
