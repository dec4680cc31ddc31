"""Determines how a model's KV cache grows, from the caches that its own forward fills on the meta device."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from zeroinf.compat.dispatch import LOCAL_SCALAR, TorchDispatchMode, storage_id
from zeroinf.compat.models import CACHE_ARGUMENTS, experts_by, takes_default_cache
from zeroinf.errors import ModelError
from zeroinf.model import meta_operators
from zeroinf.model.anatomy import LayerCache, TokenState

# Two lengths give the slope, longer than the convolution kernels of state-space models (4); a third, where the context
# allows it, is far enough out to see blocks of tokens that a model compresses together (128).
_SHORT, _LONGER, _FAR = 9, 14, 331
_PROMPT = 5
"""Tokens that an encoder reads where the decoder's cache is looked at."""


class ReadsAsZero(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lets a forward on the meta device ask for a tensor's value: it is 0 or False.

    Models ask whether a mask is full or a position is beyond some length. Neither changes what is cached.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is LOCAL_SCALAR and args[0].device.type == "meta":
            return torch.zeros((), dtype=args[0].dtype, device="cpu").item()
        return meta_operators.call(func, args, kwargs or {})


def cache_name(model: Any) -> str:
    """The argument by which the forward of `model` takes its cache; what it returns has it by that name, too.

    Raises ModelError where there is none.
    """
    accepted = inspect.signature(model.forward).parameters
    name = next((name for name in CACHE_ARGUMENTS if name in accepted), None)
    if name is None:
        raise _unreadable(model, f"its forward takes none of {', '.join(CACHE_ARGUMENTS)}")
    return name


def read_cache(model: Any, context_limit: int | None) -> tuple[LayerCache, ...]:
    """`LayerCache` of each layer of `model`, which lies on the meta device.

    Lengths below and beyond the widest window are run through the model, a prefill and then one decode step, as in
    generation; one more, with two rows, checks the result. Bytes are those of the storages that the cache holds after
    the step, so what a layer keeps beyond what attention sees is counted. A window that `context_limit` lets no row
    outgrow is None. Raises ModelError when a layer grows in a way that LayerCache cannot express.
    """
    with dense_experts(model):
        short = _filled(model, rows=1, tokens=_SHORT)
        longer = _filled(model, rows=1, tokens=_LONGER)
        widest = max(layer.get_max_length() for layer in short)
        beyond = min(max(_FAR, 2 * widest + 1), context_limit or sys.maxsize)
        far = _filled(model, rows=1, tokens=beyond)
        check = beyond * 3 // 4
        checked = _filled(model, rows=2, tokens=check)
    layers = tuple(
        _fit(model, index, {_SHORT: a, _LONGER: b, beyond: c})
        for index, (a, b, c) in enumerate(zip(short, longer, far, strict=True))
    )
    for index, (layer, found) in enumerate(zip(layers, checked, strict=True)):
        if (measured := held_bytes(vars(found))) != 2 * layer.nbytes(check):
            raise _unreadable(model, f"layer {index}: two rows of {check} tokens hold {measured} bytes")
    return layers


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


def _fit(model: Any, index: int, filled: dict[int, Any]) -> LayerCache:
    """The LayerCache that explains what a cache layer holds at three lengths."""
    short, longer, beyond = filled
    nbytes = {tokens: held_bytes(vars(layer)) for tokens, layer in filled.items()}
    per_token, rest = divmod(nbytes[longer] - nbytes[short], longer - short)
    fixed = nbytes[short] - short * per_token
    if rest or per_token < 0 or fixed < 0:
        raise _unreadable(model, f"layer {index}: bytes by length are {nbytes}")
    if per_token == 0:
        return LayerCache(fixed_bytes=fixed, bytes_per_token=0)
    kept, rest = divmod(nbytes[beyond] - fixed, per_token)
    if rest or not longer <= kept <= beyond:
        raise _unreadable(model, f"layer {index}: bytes by length are {nbytes}")
    keys, values = _token_states(filled[short])
    return LayerCache(
        fixed_bytes=fixed,
        bytes_per_token=per_token,
        window=kept if kept < beyond else None,
        keys=keys,
        values=values,
    )


def _token_states(layer: Any) -> tuple[TokenState, TokenState] | tuple[None, None]:
    """The keys and values that a token leaves in a layer of plain attention; None for every other kind."""
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
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
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
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
