"""The KV cache: memory allocated once for a job, in pages that rows take as they enter and give back as they end."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from zeroinf.generation.attention import AttentionKernel, PackedLayer, PackedView, Tokens
from zeroinf.generation.prefixes import PrefixPage
from zeroinf.generation.states import StateMemory
from zeroinf.generation.upload import to_device
from zeroinf.model.anatomy import Anatomy
from zeroinf.model.cache_layout import PAGE_TOKENS, LayerCache, PoolSize
from zeroinf.model.kv import empty_cache
from zeroinf.model.mixers import CacheWithStates
from zeroinf.model.packing import windows_of


@dataclass(frozen=True, eq=False)
class Columns:
    """The columns of left-padded rows in one forward: the last `new` of all columns are computed."""

    seats: torch.Tensor
    """(rows,), int64: each row's number among the live ones."""
    starts: torch.Tensor
    """(rows,), int64: tokens that are in the cache already."""
    lengths: torch.Tensor
    """(rows,), int64: tokens that are in the cache afterwards."""
    total: int
    new: int
    is_first: bool
    """No row has tokens in the cache."""
    is_even: bool
    """Each of the new columns holds a new token of every row."""
    is_padded: bool
    """Some columns hold no token of some row."""

    @cached_property
    def positions(self) -> torch.Tensor:
        """(rows, total), int64: the token's place in its row; below 0 where there is none."""
        return torch.arange(self.total, device=self.lengths.device) - (self.total - self.lengths)[:, None]


class PagePool:
    """One allocation of `anatomy.pool_bytes(size)` bytes for keys and values.

    A cache that grows by concatenation asks for another size at every token, and the allocator cannot use again what
    the sizes before leave behind. States of recurrent layers have slots by row behind the pages. What else layers keep
    stays transformers' own.

    Page 0 belongs to nobody. Columns without a token are read from its first place, which stays zero, and written to
    the others, which no live row reads: what is masked is multiplied by 0, and one row's NaN would survive that in
    another.
    """

    def __init__(self, model: Any, anatomy: Anatomy, size: PoolSize, device: torch.device) -> None:
        self.size = size
        self._model = None if model.config.is_encoder_decoder else model
        self._layers, self.mixers = anatomy.cache, anatomy.mixers
        self._memory = torch.empty(anatomy.pool_bytes(size), dtype=torch.uint8, device=device)
        self.states: StateMemory | None = None
        """Those of recurrent layers, behind keys and values; None where there are none."""
        if anatomy.mixers is not None:
            slots = self._memory[-size.rows * anatomy.state_bytes :].view(size.rows, -1)
            self.states = StateMemory(anatomy, size, slots)
        self._states = list(self._places())
        self._windows = windows_of(model) if self._model is not None else (None,) * len(self._layers)
        of_window = {layer.window: layer for layer in self._layers if layer.pooled}
        self._tables = {window: _Table(layer, size, device) for window, layer in of_window.items()}

    def _places(self) -> Iterator[tuple[torch.Tensor, ...]]:
        """Keys and values of each layer, which lie one after the other: (places, heads, width); none of other
        layers."""
        start = 0
        for (pooled, pages), alike in groupby((layer.pooled, layer.pool_pages(self.size)) for layer in self._layers):
            count, nbytes = len(list(alike)), sum(state.pooled_bytes(pages) for state in pooled)
            memory, of_states, first = self._memory[start : start + count * nbytes].view(count, -1), [], 0
            for state in pooled:
                used = memory[:, first : first + pages * PAGE_TOKENS * state.nbytes].view(getattr(torch, state.dtype))
                places = torch.unflatten(used, 1, (-1, state.heads, state.width))
                places[:, 0].zero_()
                of_states.append(places.unbind())
                first += state.pooled_bytes(pages)
            yield from zip(*of_states, strict=True) if pooled else [()] * count
            start += count * nbytes

    @property
    def nbytes(self) -> int:
        return self._memory.nbytes

    @property
    def is_whole(self) -> bool:
        """Whether no layer keeps anything elsewhere."""
        return self.states is not None or all(self._states)

    @property
    def takes_masks(self) -> bool:
        """Whether some layer has to be told what is padding."""
        return self.states is None or any(self._states)

    @property
    def grows(self) -> bool:
        """Whether any layer keeps something of each token; states alone take no mask once the prompt is through."""
        return any(layer.bytes_per_token for layer in self._layers)

    def open(self, tokens: Mapping[int, int], prefixes: Mapping[int, Sequence[PrefixPage]] | None = None) -> None:
        """Give rows, by their seats, pages for so many tokens each, of which the first ones lie in shared pages."""
        for table in self._tables.values() if tokens else ():
            table.open(tokens, prefixes or {})

    def close(self, seats: Sequence[int]) -> None:
        """Take back the pages of the rows of `seats`; what they still write goes nowhere."""
        for table in self._tables.values() if seats else ():
            table.close(seats)

    def drop(self, prefixes: Sequence[PrefixPage]) -> None:
        """Take back shared pages that no row uses."""
        for table in self._tables.values() if prefixes else ():
            table.drop(prefixes)

    @cached_property
    def _empty(self) -> DynamicCache:
        return self.new_cache()

    def new_cache(self) -> DynamicCache:
        """transformers' own cache, for the layers that the pool cannot hold."""
        if self._model is not None:
            return empty_cache(self._model, DynamicCache if self.states is None else CacheWithStates)
        cache = DynamicCache()
        cache.layers = [DynamicLayer() for _ in self._layers]
        return cache

    def page(self, cache: DynamicCache, columns: Columns) -> DynamicCache:
        """Let the other layers of `cache`, for one forward, read and write the pages of its rows."""
        views: dict[tuple[int | None, int | None], _PagedView] = {}
        layers = list(cache.layers)
        for index, (layer, states) in enumerate(zip(self._layers, self._states, strict=True)):
            if not states:
                continue
            key = layer.window, self._windows[index]
            if key not in views:
                views[key] = _PagedView(self._tables[layer.window], columns, self._windows[index])
            layers[index] = _PagedLayer(states, views[key], self._windows[index])
        cache.layers = layers
        return cache

    def pack(self, tokens: Tokens, kernel: AttentionKernel) -> DynamicCache:
        """A cache for one packed forward of `tokens`, whose attention reads pages: `kernel` writes and reads them."""
        views: dict[tuple[int | None, int | None], PackedView] = {}
        cache = copy.copy(self._empty)
        cache.layers = list(cache.layers)
        for index, (layer, states, window) in enumerate(zip(self._layers, self._states, self._windows, strict=True)):
            if not states:
                continue
            key = layer.window, window
            if key not in views:
                table = self._tables[layer.window]
                views[key] = PackedView(tokens, table.pages, window, table.ring_tokens, table.prefix_tokens)
            cache.layers[index] = PackedLayer(states, views[key], kernel)
        return cache


class _Table:
    """The pages of each row, in layers of one window: token i lies in the row's page i // PAGE_TOKENS.

    A row begins with pages that it shares. Its own ones come again and again behind them where a window is shorter than
    the row, so that nothing which another row still sees is ever overwritten.
    """

    def __init__(self, layer: LayerCache, size: PoolSize, device: torch.device) -> None:
        self._layer = layer
        self._width = max(1, -(-size.tokens // PAGE_TOKENS))
        self.ring_tokens = max(1, layer.row_pages(size.tokens)) * PAGE_TOKENS
        """Tokens behind which a row's own pages come again."""
        self._free = list(range(layer.pool_pages(size) - 1, 0, -1))
        self._held: dict[int, list[int]] = {}
        self._shared: dict[PrefixPage, int] = {}
        self.pages = torch.zeros(size.rows, self._width, dtype=torch.int64, device=device)
        """(rows, pages of a row), int64."""
        self.prefix_tokens: torch.Tensor | None = None
        """(rows,), int64: so many of each row's first tokens lie in shared pages; None where that makes no difference.
        """
        if size.prefix_pages and layer.window is not None:
            self.prefix_tokens = torch.zeros(size.rows, dtype=torch.int64, device=device)

    def open(self, tokens: Mapping[int, int], prefixes: Mapping[int, Sequence[PrefixPage]]) -> None:
        listed: list[int] = []
        for seat, count in tokens.items():
            shared = [self._page_of(page) for page in prefixes.get(seat, ())]
            own = -(-count // PAGE_TOKENS) - len(shared)
            taken = [self._free.pop() for _ in range(self._layer.row_pages(count - len(shared) * PAGE_TOKENS))]
            self._held[seat] = taken
            again = (taken * -(-own // len(taken)))[:own]
            listed += [*shared, *again, *[0] * (self._width - len(shared) - own)]
        seats, device = to_device(list(tokens), self.pages.device), self.pages.device
        self.pages.index_copy_(0, seats, to_device(listed, device).view(-1, self._width))
        if self.prefix_tokens is not None:
            starts = [PAGE_TOKENS * len(prefixes.get(seat, ())) for seat in tokens]
            self.prefix_tokens.index_copy_(0, seats, to_device(starts, device))

    def _page_of(self, page: PrefixPage) -> int:
        if page not in self._shared:
            self._shared[page] = self._free.pop()
        return self._shared[page]

    def close(self, seats: Sequence[int]) -> None:
        for seat in seats:
            self._free += reversed(self._held.pop(seat))
        self.pages.index_fill_(0, to_device(seats, self.pages.device), 0)

    def drop(self, prefixes: Sequence[PrefixPage]) -> None:
        self._free += [self._shared.pop(page) for page in prefixes]

    def places(self, seats: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Locations of tokens in a layer's memory. positions: (rows, columns), int64; so is the result."""
        slots = positions % (self._width * PAGE_TOKENS)
        pages = self.pages.index_select(0, seats).gather(1, slots // PAGE_TOKENS)
        return pages.mul_(PAGE_TOKENS).add_(slots.remainder_(PAGE_TOKENS))


class CacheView:
    """The part of the KV cache that layers of one window use in one forward."""

    def __init__(self, columns: Columns, window: int | None) -> None:
        self.columns = columns
        self.seen = columns.total if window is None else min(columns.total, window - 1 + columns.new)
        """Columns that attention sees, the new ones included."""
        self.positions = columns.positions[:, columns.total - self.seen :]
        self.fresh: torch.Tensor | None = None
        """(rows, new), bool: columns with a new token; None where all have one."""
        if not columns.is_even:
            self.fresh = self.positions[:, -columns.new :] >= columns.starts[:, None]


class _PagedView(CacheView):
    """The keys and values that packed layers read and write."""

    def __init__(self, table: _Table, columns: Columns, window: int | None) -> None:
        super().__init__(columns, window)
        positions = self.positions
        places = table.places(columns.seats, positions)
        if columns.is_padded:
            places.masked_fill_(positions < 0, 0)
        self.read = None if columns.is_first else places.flatten()
        places, positions = places[:, -columns.new :], positions[:, -columns.new :]
        if self.fresh is not None:
            places = places.masked_fill(~self.fresh, 0)
        if columns.new > table.ring_tokens:  # a page is written once, by the token that stays there
            places = places.masked_fill(positions < (columns.lengths - table.ring_tokens)[:, None], 0)
        self.write = places.clamp(min=1).flatten()


class SharedLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one forward's rows, as DynamicCache would give them: left-padded, in order."""

    def __init__(self, view: CacheView, window: int | None) -> None:
        super().__init__()
        self.is_sliding, self.sliding_window = window is not None, window
        self._seen, self._total = view.seen, view.columns.total
        self._held = view.columns.total - view.columns.new

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._held = self._total
        return self._keep(key_states, value_states)

    def _keep(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new states; returns them behind those of before."""
        raise NotImplementedError

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._seen, self._total - self._seen

    def get_seq_length(self) -> int:
        return self._held

    def get_max_length(self) -> int:
        return -1 if self.sliding_window is None else self.sliding_window


class _PagedLayer(SharedLayer):
    def __init__(self, memory: tuple[torch.Tensor, ...], view: _PagedView, window: int | None) -> None:
        super().__init__(view, window)
        self._memory, self._view = memory, view

    def _keep(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        memory = self._memory
        return self._in_pages(memory[0], keys), self._in_pages(memory[1], values)

    def _in_pages(self, memory: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        view, new = self._view, states.transpose(1, 2)
        is_step = view.columns.new == 1  # the one new token overwrites nothing that attention still sees
        if is_step:
            memory.index_copy_(0, view.write, new.flatten(0, 1))
        if view.read is not None:
            seen = memory.index_select(0, view.read).view(new.shape[0], view.seen, *memory.shape[1:])
            if not is_step:
                tail = seen[:, view.seen - new.shape[1] :]
                tail.copy_(new if view.fresh is None else torch.where(view.fresh[:, :, None, None], new, tail))
            states = seen.transpose(1, 2)
        if not is_step:
            memory.index_copy_(0, view.write, new.flatten(0, 1))
        return states


def columns_of(seats: Sequence[int], starts: Sequence[int], counts: Sequence[int], device: torch.device) -> Columns:
    """Columns in which each row's next `counts` tokens follow the `starts` that are in the cache."""
    lengths = [start + count for start, count in zip(starts, counts, strict=True)]
    known = to_device([*seats, *starts, *lengths], device).view(3, -1)
    new, total = max(counts), max(lengths)
    return Columns(
        seats=known[0],
        starts=known[1],
        lengths=known[2],
        total=total,
        new=new,
        is_first=not any(starts),
        is_even=min(counts) == new,
        is_padded=min(lengths) < total,
    )
