"""CUDA graphs of layers: a packed forward of few tokens replays what a layer launches, instead of launching it anew.

A layer's forward is captured in two parts, before its attention and after it. Attention itself runs between them as it
always does, over pages or over what was fetched from host memory, so nothing of the rows is in a graph. The model is
not changed: the forward of each of its layers is wrapped, and the capture ends and begins anew where the layer calls
attention.

Token counts are rounded up to a few sizes. Inputs and the result of attention lie in buffers that all graphs share, and
all graphs compute in one memory pool, since only one is under way at a time. A graph serves every layer that has the
same settings and whose weights lie at the same addresses, as those of streamed layers do that share a slot. It is
captured when a forward needs it for the second time. Layers that cannot be captured run as they would without graphs,
and `Graphs.refused` says why.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn import Module
from transformers import DynamicCache

from zeroinf.generation.attention import PackedLayer, Scores
from zeroinf.planner.graphs import MOST_GRAPHS

_Key = tuple[Any, ...]


class Capture(Protocol):
    """Records what is launched until it ends, without running it, and runs it again and again."""

    def begin(self) -> None: ...

    def end(self) -> None:
        """What has begun is over, if anything has, also where it failed."""
        ...

    def replay(self) -> None: ...


class Capturing(Protocol):
    """What graphs are made with."""

    def new(self) -> Capture: ...

    def kept(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor`, which a capture has made, for replays: the same memory, which later captures may use again."""
        ...


@dataclass(frozen=True, slots=True)
class _Graph:
    """A layer in two parts, with where they leave what is read of them."""

    before: Capture
    after: Capture
    states: tuple[torch.Tensor, ...]
    """Queries (heads, tokens, width), keys and values (kv heads, tokens, width)."""
    scores: Scores
    attended: torch.Tensor
    """(tokens, heads, width of values): where the second part reads the result of attention."""
    output: torch.Tensor
    """(1, tokens, hidden size)."""
    is_tuple: bool


class _Refusal(Exception):  # noqa: N818  it is no error: the layer runs without graphs
    """Why a layer is not captured."""


class Graphs:
    """Wraps the forwards of `blocks`; packed forwards of few tokens go through graphs from their second use on."""

    def __init__(self, blocks: Sequence[Module], capturing: Capturing, sizes: Sequence[int]) -> None:
        """sizes: token counts in ascending order."""
        self.refused = ""
        """Why some layer is not captured; empty where all are."""
        self.replays = 0
        """Layers that were replayed so far."""
        self._capturing, self._sizes = capturing, sizes
        self._buffers: dict[_Key, torch.Tensor] = {}
        self._copied: dict[_Key, torch.Tensor] = {}
        """What was copied last into a buffer: layers are handed some inputs again and again."""
        self._graphs: dict[_Key, _Graph | None] = {}
        """None: it has run once, and what its kernels need is there."""
        self._settings: dict[int, _Key] = {}
        """Of a layer that has run, by its number: what it says to attention."""
        self._refusing: set[_Key] = set()
        self._is_full = False
        """There is no memory for more."""
        kinds: list[Module] = []
        for index, block in enumerate(blocks):
            kind = next((at for at, other in enumerate(kinds) if _are_alike(block, other)), len(kinds))
            kinds += [block] if kind == len(kinds) else []
            block.forward = self._wrapped(block.forward, index, kind, list(_sites(block)))

    @property
    def count(self) -> int:
        """Layers that were captured, of one size each."""
        return sum(graph is not None for graph in self._graphs.values())

    def _wrapped(
        self, forward: Callable[..., Any], index: int, kind: int, sites: Sequence[tuple[dict[str, Any], str]]
    ) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            try:
                inputs = _Inputs.of(args, kwargs)
            except _Refusal as refusal:
                self._refuse(refusal)
                inputs = None
            if inputs is None or inputs.tokens > self._sizes[-1]:
                return forward(*args, **kwargs)
            layer: PackedLayer = inputs.cache.layers[index]
            settings = self._settings.get(index)
            size = self._sizes[bisect_left(self._sizes, inputs.tokens)]
            places = tuple(own[name].data_ptr() for own, name in sites if own[name] is not None)
            key = (kind, settings, size, inputs.signature, places)
            graph = self._graphs.get(key)
            if graph is None and key in self._graphs and self._may_capture(key):
                graph = self._graphs[key] = self._capture(forward, inputs, layer, index, size)
                if graph is None:
                    self._refusing.add(key)
            if graph is not None:
                self._fill(inputs, size)
                return self._replay(graph, inputs.tokens, layer)
            if key in self._refusing:
                return forward(*args, **kwargs)
            output = self._rehearse(forward, inputs, layer, index, size)
            assert layer.scores is not None
            self._settings[index] = _settings(layer.scores)
            self._graphs.setdefault((kind, self._settings[index], *key[2:]), None)
            return output

        return run

    def _may_capture(self, key: _Key) -> bool:
        return not self._is_full and key not in self._refusing and self.count < MOST_GRAPHS

    def _refuse(self, error: Exception) -> None:
        self.refused = self.refused or str(error).splitlines()[0]
        self._is_full |= isinstance(error, torch.OutOfMemoryError)

    def _fill(self, inputs: _Inputs, size: int) -> None:
        """Copy inputs into the buffers that graphs of `size` tokens read."""
        for at, (name, tensor) in enumerate(inputs.tensors):
            key = (name, tensor.dtype, tensor.shape[2:])
            if at and self._copied.get(key) is tensor:
                continue
            self._buffer(name, tensor, size)[:, : tensor.shape[1]].copy_(tensor)
            if at:  # hidden states, which come first, are new in each layer
                self._copied[key] = tensor

    def _buffer(self, name: str, like: torch.Tensor, size: int) -> torch.Tensor:
        """Of (1, size, ...) zeros, at the beginning of what graphs of all sizes share."""
        key = (name, like.dtype, like.shape[2:])
        if key not in self._buffers:
            self._buffers[key] = like.new_zeros(1, self._sizes[-1], *like.shape[2:])
        return self._buffers[key][:, :size]

    def _rehearse(self, forward: Callable[..., Any], inputs: _Inputs, layer: PackedLayer, index: int, size: int) -> Any:
        """Run a layer as it will be captured: what its kernels need is there afterwards."""

        def attend(split: _Split) -> None:
            layer.scores = split.scores
            query, keys, values = (each[:, : inputs.tokens] for each in split.states)
            split.attended[: inputs.tokens].copy_(layer.attend(query, keys, values, split.scores))

        self._fill(inputs, size)
        output = self._run(forward, inputs, _Split(self, layer, size, attend), index, size)
        if isinstance(output, tuple):
            return (output[0][:, : inputs.tokens], *output[1:])
        return output[:, : inputs.tokens]

    def _capture(
        self, forward: Callable[..., Any], inputs: _Inputs, layer: PackedLayer, index: int, size: int
    ) -> _Graph | None:
        before, after = self._capturing.new(), self._capturing.new()

        def go_on(split: _Split) -> None:
            before.end()
            after.begin()

        split = _Split(self, layer, size, go_on)
        self._fill(inputs, size)
        try:
            try:
                before.begin()
                output = self._run(forward, inputs, split, index, size)
            finally:
                before.end()
                after.end()
            is_tuple = isinstance(output, tuple)
            if is_tuple and any(more is not None for more in output[1:]):
                raise _Refusal("a layer returns more than its hidden states")
            states = tuple(self._capturing.kept(each) for each in split.states)
            output = self._capturing.kept(output[0] if is_tuple else output)
            return _Graph(before, after, states, split.scores, split.attended, output, is_tuple)
        except (_Refusal, RuntimeError) as error:
            self._refuse(error)
            return None

    def _run(self, forward: Callable[..., Any], inputs: _Inputs, split: _Split, index: int, size: int) -> Any:
        """`forward` of a layer with what was filled in, rounded up to `size` tokens."""
        cache = DynamicCache()
        cache.layers = [split] * (index + 1)
        filled = {name: self._buffer(name, of, size) for name, of in inputs.tensors}
        args, kwargs = inputs.with_tensors(filled, cache)
        return forward(*args, **kwargs)

    def _replay(self, graph: _Graph, tokens: int, layer: PackedLayer) -> Any:
        self.replays += 1
        graph.before.replay()
        query, keys, values = (each[:, :tokens] for each in graph.states)
        graph.attended[:tokens].copy_(layer.attend(query, keys, values, graph.scores))
        graph.after.replay()
        output = graph.output[:, :tokens].clone()  # before another layer's graph computes in the same memory
        return (output,) if graph.is_tuple else output


class CudaCapturing:
    """Captures what is launched on the current stream, whatever other threads do with the GPU meanwhile."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        """`dtype`: of products, whose libraries take their workspace for captures now."""
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.stream(self._stream):
            weight = torch.ones(16, 16, dtype=dtype, device=device)
            torch.nn.functional.linear(weight, weight, weight[0])

    def new(self) -> Capture:
        return _CudaCapture(self._stream, self._pool)

    def kept(self, tensor: torch.Tensor) -> torch.Tensor:
        base = torch.as_tensor(_Memory(tensor), device=self._device).view(tensor.dtype)
        return base.as_strided(tensor.shape, tensor.stride())


class _CudaCapture:
    def __init__(self, stream: Any, pool: Any) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._stream, self._pool = torch.cuda.stream(stream), pool
        self._has_begun = False

    def begin(self) -> None:
        self._stream.__enter__()  # type: ignore[no-untyped-call]
        self._has_begun = True
        self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def end(self) -> None:
        if not self._has_begun:
            return
        self._has_begun = False
        try:
            self._graph.capture_end()
        finally:
            self._stream.__exit__(None, None, None)

    def replay(self) -> None:
        self._graph.replay()


class _Memory:
    """The bytes that a tensor lies in, without keeping it (CUDA array interface, version 3)."""

    def __init__(self, of: torch.Tensor) -> None:
        elements = 1 + sum((size - 1) * stride for size, stride in zip(of.shape, of.stride(), strict=True))
        self.__cuda_array_interface__ = {
            "shape": (elements * of.element_size(),),
            "typestr": "|u1",
            "data": (of.data_ptr(), False),
            "version": 3,
        }


class _Split(PackedLayer):
    """The cache of a layer that is divided where it calls attention: something else happens there."""

    scores: Scores

    def __init__(self, graphs: Graphs, layer: PackedLayer, size: int, instead: Callable[[_Split], None]) -> None:
        super().__init__((), layer.view, layer.kernel)
        self._graphs, self._size, self._instead = graphs, size, instead
        self.states: tuple[torch.Tensor, ...] = ()
        self.attended = torch.empty(0)

    def attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scores: Scores) -> torch.Tensor:
        if self.states:
            raise _Refusal("a layer calls attention twice")
        self.states, self.scores = (query, keys, values), scores
        like = query.new_empty(1, 0, query.shape[0], values.shape[2])
        self.attended = self._graphs._buffer("attended", like, self._size)[0]
        self._instead(self)
        return self.attended


@dataclass(frozen=True, slots=True)
class _Inputs:
    """What a layer is called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    cache: DynamicCache
    tokens: int
    tensors: tuple[tuple[str, torch.Tensor], ...]
    """Those of (1, tokens, ...), by names of their places."""
    signature: _Key
    """Everything else about them."""

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Inputs | None:
        """None where they are no packed forward's. Raises _Refusal where graphs cannot hold them."""
        caches = [value for value in (*args, *kwargs.values()) if isinstance(value, DynamicCache)]
        if len(caches) != 1 or not caches[0].layers or not isinstance(caches[0].layers[0], PackedLayer):
            return None
        tokens = caches[0].layers[0].view.tokens.total
        found: list[tuple[str, torch.Tensor]] = []
        signature: list[Any] = []
        for name, value in _named(args, kwargs):
            if isinstance(value, torch.Tensor):
                if value.ndim < 2 or value.shape[:2] != (1, tokens):
                    raise _Refusal(f"a layer is given {name} of shape {tuple(value.shape)} for {tokens} tokens")
                found.append((name, value))
                signature.append((name, value.dtype, value.shape[2:]))
            elif isinstance(value, DynamicCache):
                signature.append((name, "cache"))
            elif value is None or isinstance(value, bool | int | float | str):
                signature.append((name, value))
            else:
                raise _Refusal(f"a layer is given {name}, a {type(value).__name__}")
        return cls(args, kwargs, caches[0], tokens, tuple(found), tuple(signature))

    def with_tensors(
        self, tensors: dict[str, torch.Tensor], cache: DynamicCache
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same arguments with other `tensors` in their places, and another cache."""

        def of(name: str, value: Any) -> Any:
            if isinstance(value, tuple | list):
                return type(value)(of(f"{name}.{at}", each) for at, each in enumerate(value))
            return cache if isinstance(value, DynamicCache) else tensors.get(name, value)

        args = tuple(of(str(at), value) for at, value in enumerate(self.args))
        return args, {name: of(name, value) for name, value in self.kwargs.items()}


def _named(args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Arguments with names of their places, those of tuples and lists one by one."""
    for name, value in (*((str(at), value) for at, value in enumerate(args)), *kwargs.items()):
        if isinstance(value, tuple | list):
            yield from _named_within(name, value)
        else:
            yield name, value


def _named_within(name: str, values: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    for at, value in enumerate(values):
        if isinstance(value, tuple | list):
            yield from _named_within(f"{name}.{at}", value)
        else:
            yield f"{name}.{at}", value


def _settings(scores: Scores) -> _Key:
    return scores.scale, scores.softcap, scores.sinks is not None


def _sites(block: Module) -> Iterator[tuple[dict[str, Any], str]]:
    """Where the tensors of `block` are bound: parameters, buffers and plain attributes of its modules."""
    for module in block.modules():
        for own in (module._parameters, module._buffers):
            yield from ((own, name) for name in own)
        yield from ((vars(module), name) for name, value in vars(module).items() if isinstance(value, torch.Tensor))


_IGNORED = {*vars(Module()), "forward", "layer_idx"}
"""What all modules have, and a layer's number, with which only the cache is asked."""


def _are_alike(one: Any, other: Any) -> bool:
    """Whether two modules do the same, but for their tensors' values and their number among the layers."""
    if isinstance(one, Module):
        if type(one) is not type(other) or one._modules.keys() != other._modules.keys():
            return False
        attributes = vars(one).keys() - _IGNORED
        if attributes != vars(other).keys() - _IGNORED:
            return False
        return (
            all(_are_alike(vars(one)[name], vars(other)[name]) for name in attributes)
            and all(_are_alike(vars(one)[kind], vars(other)[kind]) for kind in ("_parameters", "_buffers"))
            and all(_are_alike(child, other._modules[name]) for name, child in one._modules.items())
        )
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and (one.shape, one.dtype) == (other.shape, other.dtype)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_are_alike(value, other[name]) for name, value in one.items())
    plain = (bool, int, float, str, tuple, list, torch.dtype, torch.Size)
    return one is other or (type(one) is type(other) and isinstance(one, plain) and one == other)
