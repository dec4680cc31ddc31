"""Determines whether forwards of a model can be packed: rows joined to one sequence, without padding and without a
mask.

A forward on the meta device shows whether all attention of the model reaches a function that is registered with
transformers, with arguments that attention over pages supports, and which keys each layer sees.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from zeroinf.compat.models import attention_by
from zeroinf.model.anatomy import Mixers
from zeroinf.model.cache_layout import LayerCache
from zeroinf.model.kv import ReadsAsZero, cache_name, dense_experts, empty_cache
from zeroinf.model.mixers import CacheWithStates, hidden_of, mixed_by_cache, modules_of

# Tokens of the probing forward, and those of which logits are asked for; no dimension of a model is as small.
_TOKENS, _KEPT = 3, 2
_FURTHEST = 1 << 16
"""Masks are compared up to so many tokens where the model names no limit."""

_PROBE = "zeroinf_probe"
_IGNORED = {"dropout", "is_causal", "position_ids", "cache_position", "use_cache", "output_attentions", "layer_idx"}
_UNDERSTOOD = {"scaling", "sliding_window", "softcap", "s_aux"}
_MARK = "zeroinf_probed"

_NOT_DISPATCHED = "its layers do not all hand attention to a function that transformers lets others register"


_windows: WeakKeyDictionary[Any, tuple[int | None, ...]] = WeakKeyDictionary()


def windows_of(model: Any) -> tuple[int | None, ...]:
    """The window of the attention of each layer of `model` in tokens; None where it sees all of them."""
    if model not in _windows:
        own = empty_cache(model).layers
        sliding = (isinstance(each, DynamicSlidingWindowLayer) for each in own)
        _windows[model] = tuple(
            each.sliding_window if is_so else None for each, is_so in zip(own, sliding, strict=True)
        )
    return _windows[model]


def not_understood(arguments: Mapping[str, Any]) -> list[str]:
    """Names of the `arguments` that a layer hands to attention, would change what it computes, and are not known."""
    unknown = (name for name in arguments if name not in _IGNORED | _UNDERSTOOD)
    return [name for name in unknown if isinstance(arguments[name], torch.Tensor) or arguments[name]]


class _Refusal(Exception):  # noqa: N818  it is no error: the model runs padded
    """Why a model cannot be packed."""


def why_padded(
    model: Any, cache: Sequence[LayerCache], mixers: Mixers | None, blocks: int, context_limit: int | None
) -> str:
    """Why forwards of `model`, on the meta device, with `blocks` layers and such a `cache`, must be padded; empty
    where they can be packed. `mixers`: the modules that keep states."""
    if model.config.is_encoder_decoder:
        return "an encoder reads its prompts"
    if mixers is None and not all(layer.pooled for layer in cache):
        return "its layers keep more than keys and values of each token"
    if len(cache) != blocks:
        return "its layers share keys and values"
    accepted = inspect.signature(model.forward).parameters
    attending = [index for index, layer in enumerate(cache) if layer.pooled]
    if "position_ids" not in accepted and attending:
        return "its forward takes no positions"
    windows = windows_of(model)
    probe = _Probe(windows, attending, context_limit or _FURTHEST)
    try:
        probe.run(model, mixers)
    except _Refusal as refusal:
        return str(refusal)
    except (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        return f"a packed forward fails: {error}".splitlines()[0] if probe.was_reached else _NOT_DISPATCHED
    return ""


class _Probe:
    """One forward whose attention, mask and cache are looked at."""

    def __init__(self, windows: Sequence[int | None], attending: Sequence[int], furthest: int) -> None:
        """attending: the layers whose keys and values are cached."""
        self._windows, self._attending, self._furthest = windows, attending, furthest
        self._seen: list[int] = []

    @property
    def was_reached(self) -> bool:
        """Whether some layer has handed its attention over."""
        return bool(self._seen)

    def run(self, model: Any, mixers: Mixers | None) -> None:
        """Raises _Refusal, or whatever the model raises."""
        accepted = inspect.signature(model.forward).parameters
        keeps = "logits_to_keep" in accepted
        cache = empty_cache(model, CacheWithStates)
        cache.mix = _unchanged
        for index in self._attending:
            cache.layers[index] = _ProbedLayer(index)
        AttentionInterface.register(_PROBE, self._attend)
        AttentionMaskInterface.register(_PROBE, self._mask)
        with ExitStack() as stack:
            for context in (torch.no_grad(), torch.device("meta"), ReadsAsZero(), dense_experts(model)):
                stack.enter_context(context)
            stack.enter_context(attention_by(model, _PROBE))
            stack.enter_context(mixed_by_cache(modules_of(model, mixers)))
            ids = torch.zeros(1, _TOKENS, dtype=torch.long)
            inputs = {"input_ids": ids, "use_cache": True, cache_name(model): cache}
            if "position_ids" in accepted:
                inputs["position_ids"] = ids
            if keeps:
                inputs["logits_to_keep"] = torch.zeros(_KEPT, dtype=torch.long)
            logits = model(**inputs).logits
        if sorted(self._seen) != list(self._attending):
            raise _Refusal(_NOT_DISPATCHED)
        if logits.shape[1] != (_KEPT if keeps else _TOKENS):
            raise _Refusal("its forward does not keep the logits of single tokens")

    def _attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        **more: Any,
    ) -> tuple[torch.Tensor, None]:
        layer = getattr(key, _MARK, None)
        if layer is None or getattr(value, _MARK, None) != layer:
            raise _Refusal("it changes keys and values after they are cached")
        if unknown := not_understood(more):
            raise _Refusal(f"it hands {', '.join(sorted(unknown))} to attention")
        window = getattr(attention_mask, _MARK, 0)
        if window == 0 or window != self._windows[layer]:
            raise _Refusal("it makes attention masks of its own")
        rows, heads, tokens, width = query.shape
        if (rows, tokens, width) != (1, _TOKENS, key.shape[3]) or heads % key.shape[1]:
            raise _Refusal(f"queries of shape {tuple(query.shape)} meet keys of shape {tuple(key.shape)}")
        self._seen.append(layer)
        return query.new_empty(rows, tokens, heads, value.shape[3]), None

    def _mask(self, *, mask_function: Callable[..., Any], **ignored: Any) -> torch.Tensor:
        """Not a mask, but the window that the one that is asked for leaves open."""
        mask = torch.empty(())
        setattr(mask, _MARK, _window(mask_function, self._furthest))
        return mask


def _unchanged(index: int, forward: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> torch.Tensor:
    """What a recurrent module hands on, which no attention depends on."""
    return torch.empty_like(hidden_of(args, kwargs))


class _ProbedLayer(DynamicLayer):  # type: ignore[misc]
    """Marks keys and values with the number of their layer."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self._index = index

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        setattr(key_states, _MARK, self._index)
        setattr(value_states, _MARK, self._index)
        return key_states, value_states


def _window(mask_function: Callable[..., Any], furthest: int) -> int | None:
    """The number of tokens up to its own that each query sees, None for all; 0 where a mask is of another kind."""
    found: set[int | None] = set()
    with torch.device("cpu"):
        keys = torch.arange(furthest)
        nothing = torch.zeros((), dtype=torch.long)
        for query in (0, 5, furthest // 3, furthest // 2 + 1, furthest - 1):
            if not 0 <= query < furthest:
                continue
            try:
                sees = mask_function(nothing, nothing, torch.tensor(query), keys)
            except RuntimeError:  # it depends on a tensor, which lies on the meta device
                return 0
            count = int(sees.sum())
            if not bool(sees[query + 1 - count : query + 1].all()):
                return 0
            found.add(None if count == query + 1 else count)
    found -= {None} if len(found) > 1 else set()  # queries that come before the window is full
    return found.pop() if len(found) == 1 else 0
