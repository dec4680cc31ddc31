"""The KV cache: memory allocated once for a job, lent to one micro-batch after the other."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from zeroinf.model.anatomy import Anatomy, TokenState


class CachePool:
    """One allocation of `anatomy.pool_bytes(rows, tokens)` bytes for keys and values.

    A cache that grows by concatenation asks for another size at every token, and the allocator cannot use again what
    the sizes before leave behind. Layers that keep anything but keys and values a token stay transformers' own.
    """

    def __init__(self, model: Any, anatomy: Anatomy, *, rows: int, tokens: int, device: torch.device) -> None:
        self._config = model.config.get_text_config(decoder=True)
        self._anatomy, self._layers = anatomy, anatomy.cache
        self._rows, self._tokens = rows, tokens
        self._memory = torch.empty(anatomy.pool_bytes(rows, tokens), dtype=torch.uint8, device=device)

    @property
    def rows(self) -> int:
        """The most rows of a micro-batch."""
        return self._rows

    def shrink(self, rows: int) -> None:
        """Give back all memory but that of `rows` rows. Nothing may be lent."""
        self._rows, device = rows, self._memory.device
        self._memory = torch.empty(0, dtype=torch.uint8, device=device)  # the old memory first
        self._memory = torch.empty(self._anatomy.pool_bytes(rows, self._tokens), dtype=torch.uint8, device=device)

    @property
    def nbytes(self) -> int:
        return self._memory.nbytes

    def lend(self, rows: int, tokens: int) -> DynamicCache:
        """An empty cache for `rows` rows of up to `tokens` tokens, laid out as if the memory were its own.

        It takes the place of the one lent before. Raises ValueError when the pool is smaller.
        """
        if rows > self._rows or tokens > self._tokens:
            raise ValueError(f"{rows} rows of {tokens} tokens from a pool of {self._rows} rows of {self._tokens}")
        cache, start = DynamicCache(config=self._config), 0
        for index, layer in enumerate(self._layers):
            pooled = []
            for state in layer.pooled:
                pooled.append(self._part(start, state, rows, layer.pooled_tokens(tokens)))
                start += state.pooled_bytes(self._rows, layer.pooled_tokens(self._tokens))
            if pooled:
                cache.layers[index] = _pooled_layer(cache.layers[index], *pooled)
        return cache

    def _part(self, start: int, state: TokenState, rows: int, tokens: int) -> torch.Tensor:
        """Memory from byte `start` on, as (rows, heads, tokens, width)."""
        memory = self._memory[start : start + rows * tokens * state.nbytes]
        return memory.view(getattr(torch, state.dtype)).view(rows, state.heads, tokens, state.width)


def _pooled_layer(own: Any, keys: torch.Tensor, values: torch.Tensor) -> DynamicLayer:
    if isinstance(own, DynamicSlidingWindowLayer):
        return _SlidingLayer(own.sliding_window, keys, values)
    return _FullLayer(keys, values)


class _FullLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values written in place; `keys` and `values` show the part that is filled."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self._all_keys, self._all_values = keys, values

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        _initialize(self, (self._all_keys, self._all_values), (key_states, value_states))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held, new = self.keys.shape[-2], key_states.shape[-2]
        self._all_keys.narrow(-2, held, new).copy_(key_states)
        self._all_values.narrow(-2, held, new).copy_(value_states)
        self.keys = self._all_keys.narrow(-2, 0, held + new)
        self.values = self._all_values.narrow(-2, 0, held + new)
        return self.keys, self.values

    def reset(self) -> None:
        _reset(self)


class _SlidingLayer(DynamicSlidingWindowLayer):  # type: ignore[misc]
    """A window that moves on through its memory, and back to the front where that ends.

    `keys` and `values` show what the next token will see of the past: one token less than the window.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, sliding_window: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__(sliding_window)
        self._room = keys, values
        self._end = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        _initialize(self, self._room, (key_states, value_states))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        states = key_states, value_states
        held, new, room = self.keys.shape[-2], key_states.shape[-2], self._room[0].shape[-2]
        self.cumulative_length += new
        if held + new > room:
            return self._start_again(states)
        if self._end + new > room:
            self._move_to_front(held)
        for memory, state in zip(self._room, states, strict=True):
            memory.narrow(-2, self._end, new).copy_(state)
        self._end += new
        seen_keys, seen_values = (memory.narrow(-2, self._end - held - new, held + new) for memory in self._room)
        self._show(min(held + new, self.sliding_window - 1))
        return seen_keys, seen_values

    def _start_again(self, states: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend to a prompt that is longer than the memory, and keep its end."""
        keys, values = (torch.cat(pair, dim=-2) for pair in zip((self.keys, self.values), states, strict=True))
        self._end = self.sliding_window - 1
        for memory, state in zip(self._room, (keys, values), strict=True):
            memory.narrow(-2, 0, self._end).copy_(state[:, :, -self._end :])
        self._show(self._end)
        return keys, values

    def _move_to_front(self, held: int) -> None:
        """In pieces that do not overlap with where they go."""
        shift = self._end - held
        for memory in self._room:
            for start in range(0, held, shift):
                count = min(shift, held - start)
                memory.narrow(-2, start, count).copy_(memory.narrow(-2, start + shift, count))
        self._end = held

    def _show(self, held: int) -> None:
        self.keys, self.values = (memory.narrow(-2, self._end - held, held) for memory in self._room)

    def reset(self) -> None:
        _reset(self)
        self.cumulative_length = self._end = 0


def _initialize(layer: Any, room: tuple[torch.Tensor, ...], states: tuple[torch.Tensor, ...]) -> None:
    """Raises RuntimeError for states that the memory was not laid out for: copies would convert or broadcast them."""
    for memory, state in zip(room, states, strict=True):
        (rows, heads, _, width), found = memory.shape, (*state.shape[:2], state.shape[3])
        if (found, state.dtype) != ((rows, heads, width), memory.dtype):
            raise RuntimeError(
                f"the cache was planned for {rows} rows of {heads} heads of {width} in {memory.dtype}, "
                f"but the model makes {found} in {state.dtype}"
            )
    layer.dtype, layer.device = states[0].dtype, states[0].device
    layer.keys, layer.values = (memory.narrow(-2, 0, 0) for memory in room)
    layer.is_initialized = True


def _reset(layer: Any) -> None:
    layer.keys = layer.values = None
    layer.is_initialized = False
