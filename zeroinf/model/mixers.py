"""Finds the modules that keep states in recurrent layers, and determines whether their rows can be told apart.

A forward on the meta device shows which module reads and writes the states of each layer and what it is handed. Such a
module can be run by itself for some rows of a forward, from states that are kept by row, when it is handed hidden
states alone. Whether it goes on from a state with several tokens is read from the graph that autograd makes of such a
call: what it returns depends on the state, or the state is ignored.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch.nn import Module
from transformers import DynamicCache

from zeroinf.compat.models import CACHE_ARGUMENTS
from zeroinf.compat.states import StatesOfOneLayer
from zeroinf.errors import ModelError
from zeroinf.model.anatomy import USUAL_CHUNK, Mixers
from zeroinf.model.cache_layout import LayerCache, RowState
from zeroinf.model.kv import ReadsAsZero, cache_name, dense_experts

_TOKENS = 3
_UNDERSTOOD = {"hidden_states", "attention_mask"}
_CHUNKS = ("mamba_chunk_size", "chunk_size")
"""Names under which configs keep how many tokens their recurrent layers compute together."""

Mix = Callable[[int, Callable[..., Any], Sequence[Any], dict[str, Any]], Any]
"""Runs the module of a layer: its number, its forward, and the arguments of that."""


class CacheWithStates(DynamicCache):  # type: ignore[misc]
    """The cache of one forward whose recurrent modules are run by `mix`, which knows the states of its rows."""

    mix: Mix | None = None

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return True


def read_mixers(model: Any, cache: Sequence[LayerCache]) -> Mixers | None:
    """The modules that keep the states of the layers with such a `cache` in `model`, which lies on the meta device;
    None where there are none, or where they cannot be run by themselves."""
    if model.config.is_encoder_decoder or not any(layer.states for layer in cache):
        return None
    if not all(layer.is_understood for layer in cache):
        return None
    try:
        found = _Watch(model).run()
    except ModelError:
        return None
    if sorted(found) != [index for index, layer in enumerate(cache) if layer.states]:
        return None
    paths = tuple(found.get(index, "") for index in range(len(cache)))
    config = model.config.get_text_config(decoder=True)
    chunk = next((getattr(config, name) for name in _CHUNKS if getattr(config, name, None)), USUAL_CHUNK)
    stuck = _that_ignores_its_state(model, paths, cache)
    first = model.get_submodule(next(filter(None, paths)))
    return Mixers(
        paths=paths, continues=stuck is None, kind=type(first if stuck is None else stuck).__name__, chunk_tokens=chunk
    )


def modules_of(model: Any, mixers: Mixers | None) -> list[tuple[int, Module]]:
    """The recurrent modules of `model`, each with the number of its layer; fewer where layers were left out."""
    found = []
    for index, path in enumerate(() if mixers is None else mixers.paths):
        try:
            found += [(index, model.get_submodule(path))] if path else []
        except AttributeError:
            break
    return found


@contextmanager
def mixed_by_cache(modules: Sequence[tuple[int, Module]]) -> Iterator[None]:
    """While it lasts, recurrent `modules`, each with the number of its layer, are run by the `CacheWithStates` that
    they are handed, if it is one."""
    with ExitStack() as stack:
        for index, module in modules:
            stack.enter_context(_forward_by(module, partial(_mixed, index, module.forward)))
        yield


@contextmanager
def _forward_by(module: Module, forward: Callable[..., Any]) -> Iterator[None]:
    before = vars(module).get("forward")
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = before


def _mixed(index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    cache = next((each for each in (*kwargs.values(), *args) if isinstance(each, CacheWithStates)), None)
    if cache is None or cache.mix is None:
        return forward(*args, **kwargs)
    return cache.mix(index, forward, args, kwargs)


def hidden_of(args: Sequence[Any], kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden states (rows, columns, width) that a recurrent module is handed."""
    hidden: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def with_part(
    args: Sequence[Any], kwargs: dict[str, Any], hidden: torch.Tensor, cache: DynamicCache
) -> tuple[Sequence[Any], dict[str, Any]]:
    """The arguments of a recurrent module with other `hidden` states, another cache and no mask."""

    def changed(given: Any) -> Any:
        return cache if isinstance(given, DynamicCache) else given

    if args:
        args = (hidden, *map(changed, args[1:]))
    kwargs = {name: changed(given) for name, given in kwargs.items()} | {"attention_mask": None}
    return args, kwargs if args else {**kwargs, "hidden_states": hidden}


class _WatchedCache(DynamicCache):  # type: ignore[misc]
    watch: _Watch

    def update_conv_state(self, conv_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.watch.touches(layer_idx)
        found: torch.Tensor = super().update_conv_state(conv_states, layer_idx, *args, **kwargs)
        return found

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        self.watch.touches(layer_idx)
        found: torch.Tensor = super().update_recurrent_state(recurrent_states, layer_idx, *args, **kwargs)
        return found

    def update(self, *args: Any, **kwargs: Any) -> Any:
        self.watch.attends()
        return super().update(*args, **kwargs)


class _Watch:
    """One forward, in which the module that touches the states of each layer is looked at."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._inside: list[tuple[str, Module, Sequence[Any], dict[str, Any]]] = []
        self._found: dict[int, str] = {}
        self._attending: set[str] = set()

    def run(self) -> dict[int, str]:
        """The path of each layer's module. Raises ModelError where one cannot be run by itself."""
        cache = _WatchedCache(config=self._model.config.get_text_config(decoder=True))
        cache.watch = self
        hooks = [hook for name, module in self._model.named_modules() for hook in self._hooks(name, module)]
        try:
            with torch.no_grad(), torch.device("meta"), ReadsAsZero(), dense_experts(self._model):
                ids = torch.zeros(1, _TOKENS, dtype=torch.long)
                self._model(input_ids=ids, use_cache=True, **{cache_name(self._model): cache})
        finally:
            for hook in hooks:
                hook.remove()
        if self._attending.intersection(self._found.values()):
            raise ModelError("its attention has states of its own")
        return self._found

    def _hooks(self, name: str, module: Module) -> Iterator[Any]:
        def enter(module: Module, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
            self._inside.append((name, module, args, kwargs))

        def leave(module: Module, args: Any, output: Any) -> None:
            if self._inside.pop()[0] in self._found.values() and not isinstance(output, torch.Tensor):
                raise ModelError(f"{type(module).__name__} returns more than hidden states")

        yield module.register_forward_pre_hook(enter, with_kwargs=True)
        yield module.register_forward_hook(leave)

    def touches(self, layer: int) -> None:
        name, module, args, kwargs = self._inside[-1]
        accepted = inspect.signature(module.forward).parameters
        others = [*args[1:], *(given for key, given in kwargs.items() if key not in _UNDERSTOOD)]
        takes_hidden = next(iter(accepted)) == "hidden_states" or bool(args)
        if not takes_hidden or "attention_mask" not in accepted or any(map(_has_tensors, others)):
            raise ModelError(f"{type(module).__name__} is handed more than hidden states")
        if self._found.setdefault(layer, name) != name:
            raise ModelError(f"several modules keep the states of layer {layer}")

    def attends(self) -> None:
        self._attending.update(name for name, *_ in self._inside)


def _has_tensors(given: Any) -> bool:
    return isinstance(given, torch.Tensor) or (isinstance(given, list | tuple) and any(map(_has_tensors, given)))


def _that_ignores_its_state(model: Any, paths: Sequence[str], cache: Sequence[LayerCache]) -> Module | None:
    """A recurrent module that starts from nothing when it is given several tokens, whatever its states are."""
    seen = set()
    for index, (path, layer) in enumerate(zip(paths, cache, strict=True)):
        if not path:
            continue
        module: Module = model.get_submodule(path)
        if (key := (type(module), layer.states)) in seen:
            continue
        seen.add(key)
        width = model.config.get_text_config(decoder=True).hidden_size
        if not all(_depends(model, module, index, layer.states, state, width) for state in layer.states):
            return module
    return None


def _depends(model: Any, module: Module, index: int, states: Sequence[RowState], asked: RowState, width: int) -> bool:
    """Whether what `module` makes of a few tokens, or the recurrent states that it leaves, depend on one of its states.

    Where an operator that autograd does not know makes the output, the states alone tell.
    """
    with torch.enable_grad(), torch.device("meta"), ReadsAsZero():
        made = [torch.empty(1, *state.shape, dtype=getattr(torch, state.dtype)) for state in states]
        leaf = made[states.index(asked)].requires_grad_()
        handed = [(state.kind, state.number, tensor.clone()) for state, tensor in zip(states, made, strict=True)]
        call = StatesOfOneLayer(index, handed)
        hidden = torch.empty(1, _TOKENS, width, dtype=model.dtype)
        output = module(hidden, attention_mask=None, **{_cache_argument(module): call})
    left = [tensor for state, tensor in zip(states, call.left(), strict=True) if state.kind == "recurrent"]
    by_output = _reaches(output, leaf)
    if not left:
        return by_output
    return all(_reaches(each, leaf) for each in left) and (by_output or output.grad_fn is None)


def _cache_argument(module: Module) -> str:
    """The argument by which a recurrent module takes its cache."""
    accepted = inspect.signature(module.forward).parameters
    return next(name for name in CACHE_ARGUMENTS if name in accepted)


def _reaches(tensor: torch.Tensor, leaf: torch.Tensor) -> bool:
    """Whether autograd's graph leads from `tensor` to `leaf`."""
    waiting, seen = [tensor.grad_fn], set[Any]()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if getattr(node, "variable", None) is leaf:
            return True
        waiting += [following for following, _ in node.next_functions]
    return False
