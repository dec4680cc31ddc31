"""Arguments of layers, and the buffers at fixed addresses from which CUDA graphs of layers read them."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from zeroinf.generation.attention import PackedLayer

_Key = tuple[Any, ...]


class NotCaptured(Exception):  # noqa: N818  it is no error: the layer runs without graphs
    """Why a layer is not captured."""


@dataclass(frozen=True, slots=True, eq=False)
class GivenInputs:
    """What the forward of a layer is handed beside hidden states: the same for many layers of a model's forward."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shape: torch.Size
    """Of hidden states: (1, tokens, width)."""
    dtype: torch.dtype
    cache: DynamicCache
    tokens: int
    tensors: tuple[tuple[str, torch.Tensor, int], ...]
    """Those that have a dimension of tokens, by names of their places, with the number of that dimension."""
    signature: int
    """The number of everything else about the arguments."""

    @classmethod
    def of(
        cls, args: tuple[Any, ...], kwargs: dict[str, Any], index: int, signatures: dict[_Key, int]
    ) -> GivenInputs | None:
        """None where they are no packed forward's whose keys and values are kept. `signatures` are those seen before.

        Raises NotCaptured where graphs cannot hold them.
        """
        caches = [value for value in (*args, *kwargs.values()) if isinstance(value, DynamicCache)]
        if len(caches) != 1 or not isinstance(layer := caches[0].layers[index], PackedLayer):
            return None
        tokens = layer.view.tokens.total
        tensors: list[tuple[str, torch.Tensor, int]] = []
        signature: list[Any] = []
        for name, value in _named(args, kwargs):
            if isinstance(value, torch.Tensor):
                axis = 1 if value.shape[:2] == (1, tokens) else 0
                if axis == 0 and value.shape != (tokens,):
                    raise NotCaptured(f"a layer is given {name} of shape {tuple(value.shape)} for {tokens} tokens")
                tensors.append((name, value, axis))
                signature.append((name, value.dtype, axis, value.shape[2:]))
            elif isinstance(value, DynamicCache):
                signature.append((name, "cache"))
            elif value is None or isinstance(value, bool | int | float | str):
                signature.append((name, value))
            else:
                raise NotCaptured(f"a layer is given {name}, a {type(value).__name__}")
        hidden = args[0] if args else None
        if not isinstance(hidden, torch.Tensor) or hidden.shape[:2] != (1, tokens):
            raise NotCaptured("a layer is not given its hidden states first")
        number = signatures.setdefault(tuple(signature), len(signatures))
        return cls(args[1:], kwargs, hidden.shape, hidden.dtype, caches[0], tokens, tuple(tensors[1:]), number)

    def is_again(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether these arguments are the same, but for hidden states of the same kind."""
        if len(args) != len(self.args) + 1 or len(kwargs) != len(self.kwargs):
            return False
        hidden = args[0]
        return (
            all(map(operator.is_, kwargs.values(), self.kwargs.values()))
            and all(map(operator.is_, args[1:], self.args))
            and isinstance(hidden, torch.Tensor)
            and hidden.shape == self.shape
            and hidden.dtype == self.dtype
            and list(kwargs) == list(self.kwargs)
        )


@dataclass(frozen=True, slots=True, eq=False)
class LayerCall:
    """The arguments of a layer's forward, of which the first are hidden states."""

    given: GivenInputs
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    layer: PackedLayer
    """Its part of the cache."""

    @property
    def tokens(self) -> int:
        return self.given.tokens

    @property
    def hidden(self) -> torch.Tensor:
        """(1, tokens, hidden size)."""
        hidden: torch.Tensor = self.args[0]
        return hidden

    def within(
        self, buffers: GraphBuffers, layer: PackedLayer, index: int, size: int
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same arguments with tensors of `buffers` in their places, and a cache of which `layer` is one."""
        cache = DynamicCache()
        cache.layers = [layer] * (index + 1)
        tensors = {name: buffers.like(name, tensor, axis, size) for name, tensor, axis in self.given.tensors}
        tensors["0"] = buffers.hidden(self, size)

        def of(name: str, value: Any) -> Any:
            if isinstance(value, tuple | list):
                return type(value)(of(f"{name}.{at}", each) for at, each in enumerate(value))
            return cache if isinstance(value, DynamicCache) else tensors.get(name, value)

        args = tuple(of(str(at), value) for at, value in enumerate(self.args))
        return args, {name: of(name, value) for name, value in self.kwargs.items()}


def _named(args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Arguments with names of their places, those of tuples and lists one by one."""
    for name, value in (*((str(at), value) for at, value in enumerate(args)), *kwargs.items()):
        yield from _named_within(name, value)


def _named_within(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, tuple | list):
        for at, each in enumerate(value):
            yield from _named_within(f"{name}.{at}", each)
    else:
        yield name, value


class GraphBuffers:
    """Memory at addresses that do not change, one tensor for each use, of which each size takes the beginning."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._held: dict[_Key, torch.Tensor] = {}
        self._filled: dict[_Key, torch.Tensor] = {}
        """What was copied last into a buffer: layers are handed some inputs again and again."""
        self._last: GivenInputs | None = None

    def like(self, name: str, tensor: torch.Tensor, axis: int, size: int) -> torch.Tensor:
        """The buffer `name` for tensors like this one, with `size` tokens in the dimension `axis`."""
        shape = (*tensor.shape[:axis], self._most, *tensor.shape[axis + 1 :])
        return self._of(name, tensor, shape).narrow(axis, 0, size)

    def whole(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The buffer `name` for tensors of this shape."""
        return self._of(name, tensor, tuple(tensor.shape))

    def _of(self, name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        key = (name, tensor.dtype, shape)
        if key not in self._held:
            self._held[key] = tensor.new_zeros(shape)
        return self._held[key]

    def hidden(self, call: LayerCall, size: int) -> torch.Tensor:
        """The buffer of a layer's input."""
        return self.like("0", call.hidden, 1, size)

    def fill(self, call: LayerCall, size: int) -> None:
        """Copy the inputs of `call` into the buffers that graphs of `size` tokens read."""
        self.fill_given(call, size)
        self.hidden(call, size)[:, : call.tokens].copy_(call.hidden)

    def fill_given(self, call: LayerCall, size: int) -> None:
        """The same for all inputs but hidden states, which alone are new in each layer."""
        if self._last is call.given:
            return
        for name, tensor, axis in call.given.tensors:
            key = (name, tensor.dtype, tensor.shape[:axis], tensor.shape[axis + 1 :])
            if self._filled.get(key) is not tensor:
                self.like(name, tensor, axis, size).narrow(axis, 0, call.tokens).copy_(tensor)
                self._filled[key] = tensor
        self._last = call.given
