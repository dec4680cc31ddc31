"""Determines how a model's KV cache grows, from the caches that its own forward fills on the meta device."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.nn import Module, ModuleList
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from zeroinf.compat.dispatch import TorchDispatchMode, storage_id
from zeroinf.compat.models import CACHE_ARGUMENTS, experts_by, takes_default_cache
from zeroinf.compat.states import keeps_states_and_keys, states_in
from zeroinf.errors import ModelError
from zeroinf.model import meta_operators
from zeroinf.model.alike import first_alike
from zeroinf.model.cache_layout import LayerCache, RowState, TokenState

# Two lengths give the slope, longer than the convolution kernels of state-space models (4); a third, where the context
# allows it, is far enough out to see blocks of tokens that a model compresses together (128).
_SHORT, _LONGER, _FAR = 9, 14, 331
_GROUP = 128
"""Tokens of the largest groups that models compress together."""
_PROMPT = 5
"""Tokens that an encoder reads where the decoder's cache is looked at."""


class ReadsAsZero(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lets a forward on the meta device ask for a tensor's value: it is 0 or False, alone or on the host.

    Models ask whether a mask is full or a position is beyond some length. Neither changes what is cached.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = meta_operators.values(func, args, kwargs)
        return meta_operators.call(func, args, kwargs) if found is None else found


def cache_name(model: Any) -> str:
    """The argument by which the forward of `model` takes its cache; what it returns has it by that name, too.

    Raises ModelError where there is none.
    """
    accepted = inspect.signature(model.forward).parameters
    name = next((name for name in CACHE_ARGUMENTS if name in accepted), None)
    if name is None:
        raise _unreadable(model, f"its forward takes none of {', '.join(CACHE_ARGUMENTS)}")
    return name


_empty: WeakKeyDictionary[Module, dict[type[DynamicCache], DynamicCache]] = WeakKeyDictionary()


def empty_cache(model: Any, kind: type[DynamicCache] = DynamicCache) -> Any:
    """A cache with nothing in it for a forward of `model`, which makes caches by its config.

    Reading the config takes transformers a millisecond or two, so that is done once for a model.
    """
    made = _empty.setdefault(model, {})
    if kind not in made:
        made[kind] = kind(config=model.config.get_text_config(decoder=True))
    cache = copy.copy(made[kind])
    cache.layers = [_as_new(layer) for layer in cache.layers]
    return cache


def _as_new(layer: Any) -> Any:
    """A layer like `layer`, in which nothing has been kept; the states of recurrent ones lie in dicts."""
    other = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, dict | list):
            setattr(other, name, copy.copy(value))
    return other


def read_cache(
    model: Any, context_limit: int | None, stacks: Sequence[tuple[str, ModuleList]] = ()
) -> tuple[LayerCache, ...]:
    """`LayerCache` of each layer of `model`, which lies on the meta device and runs the blocks of `stacks`, each of
    which has a dotted path, one after the other.

    Lengths below and beyond the widest window are run through the model, a prefill and then one decode step, as in
    generation; one more, with two rows, checks the result. Bytes are those of the storages that the cache holds after
    the step, so what a layer keeps beyond what attention sees is counted. Of blocks that are alike, and whose layers of
    the cache are after the first length, few run the other lengths. A window that `context_limit` lets no row outgrow
    is None. Layers that compress tokens are bounded from above. Raises ModelError when a layer grows in a way that
    LayerCache cannot express, or when a forward does anything but run each block once, in order.
    """
    with dense_experts(model):
        with _walking(model, [block for _, blocks in stacks for block in blocks], forwards=2):
            short = _filled(model, rows=1, tokens=_SHORT)
        firsts = _first_alike(model, stacks, short)
        kept = min(len(firsts), max(firsts) + 2)  # a model may tell the first block by its place
        if kept < len(firsts):
            with first_blocks(model, *stacks[0], kept):
                layers = _grown(model, short[:kept], context_limit)
            return tuple(layers[first] for first in firsts)
        return _grown(model, short, context_limit)


def _first_alike(model: Any, stacks: Sequence[tuple[str, ModuleList]], short: Sequence[Any]) -> Sequence[int]:
    """For each layer of the cache, which holds a `short` row, the first that grows as it does."""
    own = range(len(short))
    if len(stacks) != 1 or len(stacks[0][1]) != len(short):
        return own
    firsts = first_alike(model.config.get_text_config(decoder=True), list(stacks[0][1]))
    kinds = [(type(layer), layer.get_max_length(), held_bytes(vars(layer))) for layer in short]
    return firsts if all(kinds[index] == kinds[first] for index, first in enumerate(firsts)) else own


@contextmanager
def first_blocks(model: Any, path: str, blocks: ModuleList, count: int) -> Iterator[ModuleList]:
    """While it lasts, `model` has no more than the first `count` of its `blocks` at `path`: these."""
    some = blocks[:count]
    model.set_submodule(path, some)
    try:
        yield some
    finally:
        model.set_submodule(path, blocks)


def _grown(model: Any, short: Sequence[Any], context_limit: int | None) -> tuple[LayerCache, ...]:
    """What explains the layers of the cache that hold a `short` row, and what they hold of longer ones."""
    count = len(short)
    longer = _filled(model, rows=1, tokens=_LONGER)[:count]
    widest = max(layer.get_max_length() for layer in short)
    beyond = min(max(_FAR, 2 * widest + 1), context_limit or sys.maxsize)
    far = _filled(model, rows=1, tokens=beyond)[:count]
    check = beyond * 3 // 4
    checked = _filled(model, rows=2, tokens=check)[:count]
    fitted = [
        _fit(model, index, {_SHORT: a, _LONGER: b, beyond: c})
        for index, (a, b, c) in enumerate(zip(short, longer, far, strict=True))
    ]
    bounds = _bounded(model, widest, context_limit, count) if None in fitted else ()
    layers = tuple(layer or bounds[index] for index, layer in enumerate(fitted))
    for index, (layer, found) in enumerate(zip(layers, checked, strict=True)):
        measured, said = held_bytes(vars(found)), 2 * layer.nbytes(check)
        if measured > said or (measured < said and not _compresses(found)):
            raise _unreadable(model, f"layer {index}: two rows of {check} tokens hold {measured} bytes")
    return layers


def can_be_pooled(model: Any, cache: Sequence[LayerCache]) -> bool:
    """Whether the layers of `cache` that keep only keys and values may find them in pages.

    Not where the model turns keys by columns that it counts itself, since pages lie behind other padding in each
    forward; nor where it wants keys to lie in memory as concatenation leaves them.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters and turns_keys(model):
        return False
    if not all(layer.pooled for layer in cache) or not takes_default_cache(model):
        return True
    own = empty_cache(model)
    for layer in own.layers:
        layer.update = partial(_as_in_pages, layer.update)
    try:
        with dense_experts(model):
            for tokens in (_SHORT, 1):
                _forward(model, 2, tokens, prompt=0, **{cache_name(model): own})
    except ModelError:
        return False
    return True


def turns_keys(model: Any) -> bool:
    """Whether `model` has rotary embeddings; RoFormer's config says so, its modules do not."""
    return any("Rotary" in type(module).__name__ for module in model.modules()) or hasattr(model.config, "rotary_value")


def _as_in_pages(update: Any, *states: Any, **more: Any) -> tuple[torch.Tensor, ...]:
    return tuple(found.transpose(1, 2).contiguous().transpose(1, 2) for found in update(*states, **more))


@contextmanager
def _walking(model: Any, blocks: Sequence[Module], forwards: int) -> Iterator[None]:
    """Raises ModelError at its end if not each of so many forwards ran `blocks` one after the other, each once."""
    visited: list[int] = []
    hooks = [
        block.register_forward_pre_hook(lambda module, inputs, index=index: visited.append(index))
        for index, block in enumerate(blocks)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    if visited != [*range(len(blocks))] * forwards:
        raise ModelError(
            f"the layers of {type(model).__name__} do not run one after the other, each once",
            hint="layers that run more than once cannot be streamed: transformers runs it where it fits",
        )


def _compresses(layer: Any) -> bool:
    """Whether a cache layer is of a class of its model's own."""
    return isinstance(layer, DynamicLayer) and type(layer).__module__ != DynamicLayer.__module__


def _bounded(model: Any, widest: int, context_limit: int | None, count: int) -> tuple[LayerCache, ...]:
    """A bound from above for each of the first `count` layers of the cache: a slope a token, and what is beyond it at
    the most.

    Layers keep an entry for every group of tokens, and all tokens of the last group: at multiples of a group their
    bytes are on a line, and one token before that they are farthest above.
    """
    first = -(-(widest + 1) // _GROUP) * _GROUP
    lengths = [_SHORT, first - 1, first, 2 * first - 1, 2 * first]
    if context_limit is not None and lengths[-1] > context_limit:
        raise _unreadable(model, f"what it compresses shows in {lengths[-1]} tokens, and it takes {context_limit}")
    filled = {tokens: _filled(model, rows=1, tokens=tokens) for tokens in lengths}
    found = []
    for index in range(count):
        nbytes = {tokens: held_bytes(vars(each[index])) for tokens, each in filled.items()}
        per_token = -(-(nbytes[2 * first] - nbytes[first]) // first)
        fixed = max(size - per_token * tokens for tokens, size in nbytes.items())
        found.append(LayerCache(fixed_bytes=fixed, bytes_per_token=per_token))
    return tuple(found)


def read_encoded_bytes(model: Any) -> int:
    """Bytes that a prompt's token leaves for the decoder of `model`, which lies on the meta device and has an encoder.

    They are those of its last state, and of its keys and values in cross-attention. Raises ModelError where what a
    prompt leaves is not so many bytes a token.
    """
    lengths = (_SHORT, _LONGER, 2 * _LONGER)
    found = {length: _encoded(model, length) for length in lengths}
    per_token = found[_SHORT] // _SHORT
    if any(nbytes != length * per_token for length, nbytes in found.items()):
        raise _unreadable(model, f"what the encoder leaves, by the prompt's length: {found}")
    return per_token


def _encoded(model: Any, tokens: int) -> int:
    output = _forward(model, 1, 1, prompt=tokens)
    layers = output[cache_name(model)].cross_attention_cache.layers
    return int(output.encoder_last_hidden_state.nbytes) + sum(held_bytes(vars(layer)) for layer in layers)


def _fit(model: Any, index: int, filled: dict[int, Any]) -> LayerCache | None:
    """The LayerCache that explains what a cache layer holds at three lengths; None for one that compresses tokens."""
    short, longer, beyond = filled
    nbytes = {tokens: held_bytes(vars(layer)) for tokens, layer in filled.items()}
    per_token, rest = divmod(nbytes[longer] - nbytes[short], longer - short)
    fixed = nbytes[short] - short * per_token
    if rest or per_token < 0 or fixed < 0:
        if _compresses(filled[short]):
            return None
        raise _unreadable(model, f"layer {index}: bytes by length are {nbytes}")
    states = _row_states(filled[short])
    if per_token == 0:
        return LayerCache(fixed_bytes=fixed, bytes_per_token=0, states=states)
    kept, rest = divmod(nbytes[beyond] - fixed, per_token)
    if rest or not longer <= kept <= beyond:
        if _compresses(filled[short]):
            return None
        raise _unreadable(model, f"layer {index}: bytes by length are {nbytes}")
    keys, values = _token_states(filled[short])
    return LayerCache(
        fixed_bytes=fixed,
        bytes_per_token=per_token,
        window=kept if kept < beyond else None,
        keys=keys,
        values=values,
        states=states,
    )


def _row_states(layer: Any) -> tuple[RowState, ...]:
    """The states in a layer's cache of one row."""
    return tuple(
        RowState(kind=kind, number=number, shape=tuple(t.shape[1:]), dtype=str(t.dtype).removeprefix("torch."))
        for kind, number, t in states_in(layer)
    )


def _token_states(layer: Any) -> tuple[TokenState, TokenState] | tuple[None, None]:
    """The keys and values that a token leaves in a layer of plain attention, which may keep states beside them; None
    for every other kind."""
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) and not keeps_states_and_keys(layer):
        return None, None
    keys, values = (
        TokenState(heads=t.shape[1], width=t.shape[3], dtype=str(t.dtype).removeprefix("torch."))
        for t in (layer.keys, layer.values)
    )
    return keys, values


def _filled(model: Any, *, rows: int, tokens: int) -> list[Any]:
    """The cache's layers after a prefill of `tokens - 1` and one decode step."""
    name = cache_name(model)
    prompt = _PROMPT if model.config.is_encoder_decoder else 0
    cache = None
    if takes_default_cache(model) and not prompt:
        cache = empty_cache(model)
    for length in (tokens - 1, 1):
        before, cache = cache, _forward(model, rows, length, prompt=prompt, **{name: cache}).get(name)
        if before is not None and cache is not before:
            raise _unreadable(model, f"its forward does not go on with the {name} that it is given")
    if prompt:
        cache = getattr(cache, "self_attention_cache", None)
    apart = dict(vars(cache)) if cache is not None else {}
    layers = apart.pop("layers", None)
    if not layers or held_bytes(apart):
        raise _unreadable(model, f"{type(cache).__name__} keeps states outside its layers")
    if prompt:  # there may be one for each layer of the longer stack
        layers = [layer for layer in layers if layer.is_initialized]
        if any(type(layer) is not DynamicLayer for layer in layers):
            raise _unreadable(model, "its decoder keeps more than keys and values, or drops some")
    return list(layers)


def _forward(model: Any, rows: int, tokens: int, *, prompt: int, **cache: Any) -> Any:
    """The output of a forward of `tokens`; where an encoder reads a `prompt` of so many, they are the decoder's."""
    try:
        with torch.no_grad(), torch.device("meta"), ReadsAsZero():
            ids = torch.zeros(rows, tokens, dtype=torch.long)
            inputs = {"input_ids": ids}
            if prompt:
                inputs = {"input_ids": torch.zeros(rows, prompt, dtype=torch.long), "decoder_input_ids": ids}
            return model(**inputs, use_cache=True, **cache)
    except (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        raise _unreadable(model, f"a forward of {tokens} tokens fails on the meta device: {error}") from error


@contextmanager
def dense_experts(model: Any) -> Iterator[None]:
    """Run experts by a method whose meta kernel takes every dtype; that of the default, grouped_mm, wants bfloat16."""
    with experts_by(model, "batched_mm"):
        yield


def held_bytes(attributes: dict[str, Any]) -> int:
    """Bytes of the storages behind all tensors of a cache layer, each once; scalars are bookkeeping, not cache."""
    storages = {storage_id(t): t.untyped_storage().nbytes() for t in _tensors(attributes) if t.dim()}
    return sum(storages.values())


def _tensors(value: Any) -> Iterator[Any]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _unreadable(model: Any, term: str) -> ModelError:
    return ModelError(
        f"the KV cache of {type(model).__name__} cannot be read: {term}",
        hint="without the cache's size nothing can be planned; please report the model",
    )
