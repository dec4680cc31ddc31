"""CUDA graphs of layers: a packed forward of few tokens replays what a layer launches, instead of launching it anew.

A layer's forward is captured in two parts, before its attention and after it. Attention itself runs between them as it
always does, over pages or over what was fetched from host memory, so nothing of the rows is in a graph. The model is
not changed: the forward of each of its layers is wrapped, and the capture ends and begins anew where the layer calls
attention.

Token counts are rounded up to a few sizes, and those of few tokens to a larger one that has a graph already. All that a
graph reads from outside, and all that is read of it, lies in buffers that were allocated before: hidden states and the
other inputs of a layer, queries, keys and values, the result of attention, and the layer's output. So nobody reads the
memory pool in which all graphs compute, one at a time. A graph serves every layer that does the same with weights at
the same addresses, as streamed layers do that share a slot.

A layer runs once as it is, and is watched: whether it calls attention once, waits for the GPU, returns one tensor. The
next time it runs in the buffers, so that kernels for that size are compiled and loaded, and then it is captured. What
cannot be captured runs as it would without graphs, and `Graphs.refused` says why.
"""

from __future__ import annotations

import gc
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch.nn import Module

from zeroinf.compat.graphs import CudaCapture, ignoring_waits, noting_waits
from zeroinf.compat.modules import own_buffers, own_parameters
from zeroinf.generation.attention import PackedLayer, Scores
from zeroinf.generation.graph_inputs import GivenInputs, GraphBuffers, LayerCall, NotCaptured
from zeroinf.planner.graphs import FLAT_TOKENS, SERVED_TIMES

_Key = tuple[Any, ...]


class Capture(Protocol):
    """Records what is launched until it ends, without running it, and runs it again and again."""

    def begin(self) -> None: ...

    def end(self) -> None:
        """End what has begun, if anything has, also where it failed."""
        ...

    def replay(self) -> None: ...


class Capturing(Protocol):
    """Makes graphs."""

    def new(self) -> Capture: ...

    def watching(self) -> AbstractContextManager[list[str]]:
        """While it lasts, what cannot be captured is noted."""
        ...

    def unwatched(self) -> AbstractContextManager[None]:
        """While it lasts, nothing is noted."""
        ...


class _States(NamedTuple):
    """What a layer hands to its attention."""

    query: torch.Tensor
    """(heads, tokens, width)."""
    keys: torch.Tensor
    """(kv heads, tokens, width), as values."""
    values: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Graph:
    """A layer in two parts, with the buffers that the outside writes and reads."""

    before: Capture
    after: Capture
    hidden: torch.Tensor
    """(1, tokens, hidden size): its input."""
    states: _States
    sinks: torch.Tensor | None
    attended: torch.Tensor
    """(tokens, heads, width of values)."""
    output: torch.Tensor
    """(1, tokens, hidden size)."""
    more: int | None
    """What a layer returns behind its hidden states in a tuple, each None; None where it returns no tuple."""


class Graphs:
    """Wraps the forwards of `blocks`; packed forwards of few tokens go through graphs from their second use on."""

    def __init__(
        self,
        blocks: Sequence[Module],
        capturing: Capturing,
        sizes: Sequence[int],
        *,
        most: int,
        launched: Sequence[Module] = (),
    ) -> None:
        """sizes: token counts in ascending order. most: layers that are captured, one of each size. Blocks that contain
        any of the modules `launched` have no graphs."""
        self.replays = 0
        """Layers that were replayed so far."""
        self._capturing, self._sizes, self._most, self._blocks = capturing, sizes, most, blocks
        self._buffers = GraphBuffers(sizes[-1])
        self._recent: deque[GivenInputs] = deque(maxlen=2)  # such as layers with windows and layers without
        self._signatures: dict[_Key, int] = {}
        self._graphs: dict[_Key, _Graph] = {}
        self._rehearsed: set[_Key] = set()
        self._refusing: set[_Key] = set()
        self._refusals: dict[str, set[int]] = {}
        self._has_failed = False
        kinds: list[Module] = []
        for index, block in enumerate(blocks):
            if any(module in launched for module in block.modules()):
                continue
            if why := _why_not(block):
                self._refuse(why, index)
                continue
            kind = next((at for at, other in enumerate(kinds) if _are_alike(block, other)), len(kinds))
            kinds += [block] if kind == len(kinds) else []
            block.forward = _Layer(self, block.forward, index, kind, *_places(block))

    @property
    def count(self) -> int:
        """Layers that were captured, of one size each."""
        return len(self._graphs)

    @property
    def refused(self) -> str:
        """The layers that run without graphs, and why; empty where all may have some."""
        found = (f"{_numbers(layers)}: {why}" for why, layers in self._refusals.items())
        return "; ".join(found)

    def close(self) -> None:
        """Give the layers their forwards back."""
        for block in self._blocks:
            if isinstance(wrapped := vars(block).get("forward"), _Layer):
                wrapped.unwrap(block)

    def run(self, layer: _Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The forward of a layer, with a graph if there may be one."""
        call = None
        may_be = layer.may_be_captured and not self._exceeds(args)
        try:
            call = self._call(layer.index, args, kwargs) if may_be else None
        except NotCaptured as refusal:
            self._refuse(str(refusal), layer.index)
            layer.may_be_captured = False
        if call is None:
            return layer.forward(*args, **kwargs)
        if layer.scores is None:
            return self._watch(layer, call)
        size = self._sizes[bisect_left(self._sizes, call.tokens)]
        key = (layer.kind, size, call.given.signature, layer.places())
        found = self._larger(key) if key not in self._graphs else None
        if found is not None:
            return self._replay(*found, call, layer.scores)
        graph = self._graphs.get(key) or self._graph(key, layer, call, size)
        if graph is not None:
            return self._replay(graph, size, call, layer.scores)
        if key in self._rehearsed or key in self._refusing:
            return layer.forward(*args, **kwargs)
        return self._rehearse(key, layer, call, size)

    def _exceeds(self, args: tuple[Any, ...]) -> bool:
        """Whether a layer's arguments are those of a forward with more tokens than any graph has. Nothing of them is
        kept then: they take memory until they are forgotten."""
        hidden = args[0] if args else None
        return isinstance(hidden, torch.Tensor) and hidden.dim() > 1 and hidden.shape[1] > self._sizes[-1]

    def _call(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerCall | None:
        """The arguments of layer `index`; None where they are no packed forward's whose keys and values are kept.

        Raises NotCaptured where graphs cannot hold them.
        """
        for given in self._recent:
            if given.is_again(args, kwargs):
                break
        else:
            found = GivenInputs.of(args, kwargs, index, self._signatures)
            if found is None:
                return None
            given = found
            self._recent.append(given)
        layer = given.cache.layers[index]
        return LayerCall(given, args, kwargs, layer) if isinstance(layer, PackedLayer) else None

    def _refuse(self, why: str, index: int) -> None:
        self._refusals.setdefault(why, set()).add(index)

    def _watch(self, layer: _Layer, call: LayerCall) -> Any:
        """Run a layer as it is, and see whether it can be captured."""
        seen = _Seen(call.layer, self._capturing)
        call.given.cache.layers[layer.index] = seen
        try:
            with self._capturing.watching() as problems:
                output = layer.forward(*call.args, **call.kwargs)
        finally:
            call.given.cache.layers[layer.index] = call.layer
        if len(seen.scores) != 1:
            problems.append(f"a layer calls attention {len(seen.scores)} times")
        if isinstance(output, tuple) and any(more is not None for more in output[1:]):
            problems.append("a layer returns more than its hidden states")
        if problems:
            self._refuse(problems[0], layer.index)
            layer.may_be_captured = False
        else:
            layer.scores = Scores(seen.scores[0].scale, seen.scores[0].softcap, None)
        return output

    def _larger(self, key: _Key) -> tuple[_Graph, int] | None:
        """A graph for more tokens than `key` says, with its size, where it takes the GPU about as long."""
        kind, size, *others = key
        for larger in self._sizes[bisect_left(self._sizes, size) + 1 :]:
            if larger > min(FLAT_TOKENS, SERVED_TIMES * size):
                return None
            if (graph := self._graphs.get((kind, larger, *others))) is not None:
                return graph, larger
        return None

    def _graph(self, key: _Key, layer: _Layer, call: LayerCall, size: int) -> _Graph | None:
        """A graph for `key`, captured now if it may be."""
        may_be = key in self._rehearsed and key not in self._refusing and not self._has_failed
        if not may_be or self.count >= self._most:
            return None
        try:
            self._graphs[key] = self._capture(layer, call, size)
        except RuntimeError as error:  # what a GPU cannot capture, or has no memory for
            self._has_failed = True
            self._refuse(f"a capture failed: {str(error).splitlines()[0]}", layer.index)
        return self._graphs.get(key)

    def _rehearse(self, key: _Key, layer: _Layer, call: LayerCall, size: int) -> Any:
        """Run a layer as it will be captured."""

        def attend(split: _Split) -> None:
            with self._capturing.unwatched():
                query, keys, values = (each[:, : call.tokens] for each in split.states)
                split.attended[: call.tokens].copy_(call.layer.attend(query, keys, values, split.scores))

        self._buffers.fill(call, size)
        with self._capturing.watching() as problems:
            output, more = self._run(layer, call, _Split(self._buffers, call.layer, size, attend), size)
        if problems:
            self._refuse(problems[0], layer.index)
            self._refusing.add(key)
        self._rehearsed.add(key)
        return _returned(output[:, : call.tokens].clone(), more)

    def _capture(self, layer: _Layer, call: LayerCall, size: int) -> _Graph:
        before, after = self._capturing.new(), self._capturing.new()

        def go_on(split: _Split) -> None:
            before.end()
            after.begin()

        split = _Split(self._buffers, call.layer, size, go_on)
        collects = gc.isenabled()
        gc.disable()  # it might free memory in ways that a capture does not allow
        try:
            before.begin()
            output, more = self._run(layer, call, split, size)
            after.end()
        except BaseException:
            for part in (before, after):
                with suppress(RuntimeError):
                    part.end()
            raise
        finally:
            if collects:
                gc.enable()
        hidden = self._buffers.hidden(call, size)
        return _Graph(before, after, hidden, split.states, split.scores.sinks, split.attended, output, more)

    def _run(self, layer: _Layer, call: LayerCall, split: _Split, size: int) -> tuple[torch.Tensor, int | None]:
        """The output of a layer in its buffer, for `size` tokens of what was filled in, and what is behind it."""
        args, kwargs = call.within(self._buffers, split, layer.index, size)
        output = layer.forward(*args, **kwargs)
        hidden, more = (output[0], len(output) - 1) if isinstance(output, tuple) else (output, None)
        return self._buffers.like("output", hidden, 1, size).copy_(hidden), more

    def _replay(self, graph: _Graph, size: int, call: LayerCall, scores: Scores) -> Any:
        self.replays += 1
        tokens = call.tokens
        hidden, states, into, output = graph.hidden, graph.states, graph.attended, graph.output
        if tokens < size:
            hidden, output, into = hidden[:, :tokens], output[:, :tokens], into[:tokens]
            states = _States(*[each[:, :tokens] for each in states])
        self._buffers.fill_given(call, size)
        hidden.copy_(call.hidden)
        graph.before.replay()
        if graph.sinks is not None:
            scores = Scores(scores.scale, scores.softcap, graph.sinks)
        call.layer.into = into
        attended = call.layer.attend(*states, scores)
        call.layer.into = None
        if attended is not into:  # such as what the CPU has attended to
            into.copy_(attended)
        graph.after.replay()
        return _returned(output.clone(), graph.more)  # the buffer is the next layer's, and the next forward's


class CudaCapturing:
    """Captures on a stream of its own; all graphs compute in one memory pool."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        """`dtype`: of products, whose libraries take their workspace for the stream before the first capture."""
        self._device, self._dtype = device, dtype
        self._stream: Any = None
        self._pool: Any = None

    def new(self) -> Capture:
        if self._stream is None:  # in the thread that captures: libraries have workspaces for each
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            self._pool = torch.cuda.graph_pool_handle()
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                weight = torch.ones(16, 16, dtype=self._dtype, device=self._device)
                torch.nn.functional.linear(weight, weight)
                torch.nn.functional.linear(weight, weight, weight[0])
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return CudaCapture(self._device, self._stream, self._pool)

    def watching(self) -> AbstractContextManager[list[str]]:
        return noting_waits()

    def unwatched(self) -> AbstractContextManager[None]:
        return ignoring_waits()


def _returned(hidden: torch.Tensor, more: int | None) -> Any:
    return hidden if more is None else (hidden, *[None] * more)


class _Layer:
    """Stands for the forward of one layer."""

    def __init__(
        self,
        graphs: Graphs,
        forward: Callable[..., Any],
        index: int,
        kind: int,
        held: Sequence[dict[str, Any]],
        attributes: Sequence[tuple[dict[str, Any], str]],
    ) -> None:
        """Layers of one `kind` do the same. Where their tensors are: all that is `held`, and some `attributes`."""
        self.forward, self.index, self.kind = forward, index, kind
        self.may_be_captured = True
        self.scores: Scores | None = None
        """What it says to attention, but for sinks; None where it has not been watched yet."""
        self._graphs, self._held, self._attributes = graphs, held, attributes

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._graphs.run(self, args, kwargs)

    def places(self) -> tuple[int, ...]:
        """Addresses of the layer's tensors."""
        found = [each for own in self._held for each in own.values()]  # expanded weights have names of their own
        found += [own[name] for own, name in self._attributes]
        return tuple([0 if each is None else each.data_ptr() for each in found])

    def unwrap(self, block: Module) -> None:
        """Give `block` its forward back."""
        del vars(block)["forward"]
        if block.forward != self.forward:
            vars(block)["forward"] = self.forward


class _Seen(PackedLayer):
    """The cache of a layer that is watched: it notes what attention is asked for."""

    def __init__(self, layer: PackedLayer, capturing: Capturing) -> None:
        super().__init__(layer.memory, layer.view, layer.kernel)
        self._layer, self._capturing = layer, capturing
        self.scores: list[Scores] = []

    def attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scores: Scores) -> torch.Tensor:
        self.scores.append(scores)
        with self._capturing.unwatched():
            return self._layer.attend(query, keys, values, scores)


class _Split(PackedLayer):
    """The cache of a layer that is divided where it calls attention: something else happens there."""

    def __init__(self, buffers: GraphBuffers, layer: PackedLayer, size: int, instead: Callable[[_Split], None]) -> None:
        super().__init__(layer.memory, layer.view, layer.kernel)
        self._buffers, self._size, self._instead = buffers, size, instead
        self.states = _States(*[torch.empty(0)] * 3)
        self.scores = Scores(1.0, None, None)
        self.attended = torch.empty(0)

    def attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scores: Scores) -> torch.Tensor:
        buffers, size = self._buffers, self._size
        given = ("queries", query), ("keys", keys), ("values", values)
        self.states = _States(
            *[buffers.like(name, each.transpose(0, 1), 0, size).transpose(0, 1).copy_(each) for name, each in given]
        )
        sinks = None if scores.sinks is None else buffers.whole("sinks", scores.sinks).copy_(scores.sinks)
        self.scores = Scores(scores.scale, scores.softcap, sinks)
        like = query.new_empty(0, query.shape[0], values.shape[2])
        self.attended = buffers.like("attended", like, 0, size)
        self._instead(self)
        return self.attended


def _places(block: Module) -> tuple[list[dict[str, Any]], list[tuple[dict[str, Any], str]]]:
    """Where the tensors of `block` are: dictionaries of parameters and buffers, and plain attributes of its modules."""
    modules = list(block.modules())
    held = [own for module in modules for own in (own_parameters(module), own_buffers(module))]
    attributes = [
        (vars(module), name)
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, torch.Tensor)
    ]
    return held, attributes


def _why_not(block: Module) -> str:
    """Why `block` is launched in any case; empty where it need not be. Tensors of classes that hold no memory say where
    theirs is if `data_ptr` is their own."""
    if any(isinstance(module, torch.nn.Embedding) for module in block.modules()):
        return "a layer reads rows of a table, which may be gathered in host memory"
    plain = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
    held, attributes = _places(block)
    found = [*(each for own in held for each in own.values()), *(own[name] for own, name in attributes)]
    kinds = [type(each) for each in found if each is not None]
    unknown = (kind for kind in kinds if kind not in plain and kind.data_ptr is torch.Tensor.data_ptr)
    return next((f"a layer has weights of type {kind.__name__}" for kind in unknown), "")


_IGNORED = {*vars(Module()), "forward", "layer_idx"}
"""What all modules have, and a layer's number, with which only the cache is asked."""


def _are_alike(one: Any, other: Any) -> bool:
    """Whether two modules do the same, but for their tensors' values and their number among the layers."""
    if isinstance(one, Module):
        children, others = dict(one.named_children()), dict(other.named_children())
        if type(one) is not type(other) or children.keys() != others.keys():
            return False
        attributes = vars(one).keys() - _IGNORED
        if attributes != vars(other).keys() - _IGNORED:
            return False
        return (
            all(_are_alike(vars(one)[name], vars(other)[name]) for name in attributes)
            and all(_are_alike(own(one), own(other)) for own in (own_parameters, own_buffers))
            and all(_are_alike(child, others[name]) for name, child in children.items())
        )
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and (one.shape, one.dtype) == (other.shape, other.dtype)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_are_alike(value, other[name]) for name, value in one.items())
    plain = (bool, int, float, str, tuple, list, torch.dtype, torch.Size)
    return one is other or (type(one) is type(other) and isinstance(one, plain) and one == other)


def _numbers(layers: set[int]) -> str:
    first, *more = sorted(layers)
    return f"layer {first} and {len(more)} more" if more else f"layer {first}"
