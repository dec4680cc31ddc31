"""How a model's cache grows, read off the caches that its own forward fills on the meta device."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from zeroinf.errors import ModelError
from zeroinf.model.anatomy import LayerCache

# Two short lengths give the slope; the third, with two rows, checks it. All are longer than the convolution
# kernels of state-space models (4) and no multiple of anything.
_SHORT, _LONGER, _CHECK = 9, 14, 331


def read_cache(model: Any) -> tuple[LayerCache, ...]:
    """`LayerCache` of each layer of `model`, which lies on the meta device.

    Lengths below and beyond the widest window are run through the model, a prefill and then one decode step, as in
    generation. Bytes are those of the storages that the cache holds after the step, so what a layer keeps beyond what
    attention sees is counted. Raises ModelError when a layer grows in a way that LayerCache cannot express.
    """
    short, windows = _measure(model, rows=1, tokens=_SHORT)
    longer, _ = _measure(model, rows=1, tokens=_LONGER)
    beyond = max(_CHECK, 2 * max(windows) + 1)
    far, _ = _measure(model, rows=1, tokens=beyond)
    layers = tuple(
        _fit(model, index, {_SHORT: a, _LONGER: b, beyond: c})
        for index, (a, b, c) in enumerate(zip(short, longer, far, strict=True))
    )
    check = beyond + _CHECK
    for index, (layer, measured) in enumerate(zip(layers, _measure(model, rows=2, tokens=check)[0], strict=True)):
        if measured != 2 * layer.nbytes(check):
            raise _unreadable(model, f"layer {index}: two rows of {check} tokens hold {measured} bytes")
    return layers


def _fit(model: Any, index: int, nbytes: dict[int, int]) -> LayerCache:
    """The LayerCache that explains bytes at three lengths."""
    short, longer, beyond = nbytes
    per_token, rest = divmod(nbytes[longer] - nbytes[short], longer - short)
    fixed = nbytes[short] - short * per_token
    if rest or per_token < 0 or fixed < 0:
        raise _unreadable(model, f"layer {index}: bytes by length are {nbytes}")
    if per_token == 0:
        return LayerCache(fixed_bytes=fixed, bytes_per_token=0)
    kept, rest = divmod(nbytes[beyond] - fixed, per_token)
    if rest or not longer <= kept <= beyond:
        raise _unreadable(model, f"layer {index}: bytes by length are {nbytes}")
    return LayerCache(fixed_bytes=fixed, bytes_per_token=per_token, window=kept if kept < beyond else None)


def _measure(model: Any, *, rows: int, tokens: int) -> tuple[list[int], list[int]]:
    """Bytes held by each cache layer after a prefill of `tokens - 1` and one decode step, and its declared window."""
    import torch
    from transformers import DynamicCache

    parameters = inspect.signature(model.forward).parameters
    name = "past_key_values" if "past_key_values" in parameters else "cache_params"
    cache = (
        DynamicCache(config=model.config.get_text_config(decoder=True))
        if model._supports_default_dynamic_cache()
        else None
    )
    try:
        with torch.inference_mode(), torch.device("meta"):
            for length in (tokens - 1, 1):
                ids = torch.zeros(rows, length, dtype=torch.long)
                cache = model(input_ids=ids, use_cache=True, **{name: cache}).get(name)
    except (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        raise _unreadable(model, f"a forward of {tokens} tokens fails on the meta device: {error}") from error
    apart = dict(vars(cache)) if cache is not None else {}
    layers = apart.pop("layers", None)
    if not layers or held_bytes(apart):
        raise _unreadable(model, f"{type(cache).__name__} keeps states outside its layers")
    return [held_bytes(vars(layer)) for layer in layers], [layer.get_max_length() for layer in layers]


def held_bytes(attributes: dict[str, Any]) -> int:
    """Bytes of the storages behind all tensors of a cache layer, each once; scalars are bookkeeping, not cache."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in _tensors(attributes) if t.dim()}
    return sum(storages.values())


def _tensors(value: Any) -> Iterator[Any]:
    import torch

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
