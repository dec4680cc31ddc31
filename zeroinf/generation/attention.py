"""Attention of packed forwards: rows lie side by side in one sequence, and their keys and values lie in pages.

Models hand their queries, keys and values to `attend`, which is registered with transformers. New keys and values are
written into the pages of their rows, and each row attends to its own ones where they lie: nothing is gathered, padded
or masked. Kernels do that work: the one here for the CPU, another one for GPUs.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.cache_utils import DynamicLayer

from zeroinf.generation.upload import to_device
from zeroinf.model.cache_layout import PAGE_TOKENS
from zeroinf.model.packing import not_understood

IMPLEMENTATION = "zeroinf_pages"
"""The name under which transformers knows `attend`. No mask is registered with it, so that models make none."""

MOST_PARTS = 1024
"""Programs that share the keys of decode steps, at the most, where few rows have long contexts."""

_LAYER = "zeroinf_layer"
# A place in the page that belongs to no row.
_NOWHERE = 1


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens of one packed forward: of each row the next `counts`, behind the `starts` that are in its pages."""

    starts: tuple[int, ...]
    counts: tuple[int, ...]
    firsts: tuple[int, ...]
    """Where each row's first new token lies in the sequence."""
    rows: torch.Tensor
    """(4, rows), int64: each row's seat, its tokens in pages, its new tokens, and the place of the first one."""
    seats: torch.Tensor
    """(tokens,), int64: the seat of each token's row."""
    positions: torch.Tensor
    """(tokens,), int64: the token's place in its row."""
    lengths: torch.Tensor
    """(tokens,), int64: tokens of its row that are in the cache afterwards."""
    blocks: dict[Any, torch.Tensor | None] = field(default_factory=dict)
    """Shares of the work, by what a kernel knows them by; layers that are alike make them once."""

    @property
    def total(self) -> int:
        return self.seats.shape[0]


def tokens_of(seats: Sequence[int], starts: Sequence[int], counts: Sequence[int], device: torch.device) -> Tokens:
    """Rows side by side in the order of `seats`. Nothing here waits for the device."""
    *firsts, total = accumulate(counts, initial=0)
    rows = to_device([*seats, *starts, *counts, *firsts], device).view(4, -1)
    if total == len(firsts):  # a token of each row
        return Tokens(tuple(starts), tuple(counts), tuple(firsts), rows, rows[0], rows[1], rows[1] + 1)
    at = torch.arange(total, device=device)
    of_each = rows.index_select(1, torch.bucketize(at, rows[3], right=True).sub_(1))
    positions = at.sub_(of_each[3]).add_(of_each[1])
    return Tokens(tuple(starts), tuple(counts), tuple(firsts), rows, of_each[0], positions, of_each[1] + of_each[2])


@dataclass(frozen=True, slots=True)
class Scores:
    """The steps from products of queries and keys to weights: scale, soft cap, sinks."""

    scale: float
    softcap: float | None
    """They are squeezed to less than this, either side of zero."""
    sinks: torch.Tensor | None
    """(heads,): a score that takes its share of the weights and has no value."""


class AttentionKernel(Protocol):
    """Writes new keys and values into pages and attends."""

    def __call__(
        self, layer: PackedLayer, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scores: Scores
    ) -> torch.Tensor:
        """query: (heads, tokens, width); keys and values: (kv heads, tokens, widths of their own).

        Returns (tokens, heads, width of values), contiguous.
        """
        ...


class View:
    """The keys and values that layers of one window read and write in one forward; see its two kinds."""

    places: torch.Tensor | None = None
    """(tokens,), int64: where new keys and values go among those of before; None: they go elsewhere."""
    overwrites = False
    """Whether new keys may take the places of some that new queries still see."""

    row_tokens = 0
    """Tokens that a row's pages may hold; 0: keys of a row lie side by side."""

    def __init__(self, tokens: Tokens, window: int | None) -> None:
        self.tokens, self.window = tokens, window
        self.work: dict[Any, Any] = {}
        """What a kernel launches in each layer, by what it knows layers by; those that are alike make it once."""

    @property
    def where(self) -> torch.Tensor:
        """Locations of the rows' keys and values, as the view's kind has them."""
        raise NotImplementedError

    @property
    def has_new(self) -> bool:
        """Whether new keys and values lie among those of before while queries attend."""
        return self.places is not None and not self.overwrites

    @cached_property
    def held(self) -> list[torch.Tensor]:
        """Locations of the earlier keys that each row sees: (keys,), int64, on the CPU alone."""
        raise NotImplementedError

    @cached_property
    def longest_step(self) -> int:
        """The most keys that a row with one new token sees, its own included."""
        steps = [start + 1 for start, count in zip(self.tokens.starts, self.tokens.counts, strict=True) if count == 1]
        longest = max(steps, default=0)
        return longest if self.window is None else min(longest, self.window)

    def first_seen(self, start: int) -> int:
        """The first key that a query at `start` sees."""
        return 0 if self.window is None else max(0, start - self.window + 1)


class PackedView(View):
    """Keys and values lie in pages, new ones beside those of before."""

    def __init__(
        self,
        tokens: Tokens,
        pages: torch.Tensor,
        window: int | None,
        ring_tokens: int | None = None,
        prefix_tokens: torch.Tensor | None = None,
    ) -> None:
        """pages: (seats, pages of a row), int64; token i lies in page i // PAGE_TOKENS of its row.

        `ring_tokens` later the row's pages come again (None: behind the last one), but for the first `prefix_tokens` of
        each row, (seats,), int64; None: of no row.
        """
        super().__init__(tokens, window)
        self.pages = pages
        self.row_tokens = pages.shape[1] * PAGE_TOKENS
        slots = tokens.positions % self.row_tokens
        flat = (tokens.seats * pages.shape[1]).add_(slots // PAGE_TOKENS)
        self.places = pages.view(-1).index_select(0, flat).mul_(PAGE_TOKENS).add_(slots.remainder_(PAGE_TOKENS))
        if window is not None:  # a page is written once, by the token that stays there
            passed = tokens.positions < tokens.lengths - (ring_tokens or self.row_tokens)
            if prefix_tokens is not None:
                passed.logical_and_(tokens.positions >= prefix_tokens.index_select(0, tokens.seats))
            self.places.masked_fill_(passed, _NOWHERE)
        self.overwrites = window is not None and any(
            start and count > 1 for start, count in zip(tokens.starts, tokens.counts, strict=True)
        )

    @property
    def where(self) -> torch.Tensor:
        """The pages, as they are given."""
        return self.pages

    @cached_property
    def held(self) -> list[torch.Tensor]:
        found = []
        for seat, start in zip(self.tokens.rows[0].tolist(), self.tokens.starts, strict=True):
            slots = torch.arange(self.first_seen(start), start) % self.row_tokens
            found.append(self.pages[seat].index_select(0, slots // PAGE_TOKENS) * PAGE_TOKENS + slots % PAGE_TOKENS)
        return found


class StagedView(View):
    """A view in which a row's earlier keys lie side by side where they were fetched to; new keys and values go
    elsewhere."""

    def __init__(self, tokens: Tokens, window: int | None) -> None:
        super().__init__(tokens, window)
        firsts = [self.first_seen(start) for start in tokens.starts]
        *at, self.total = accumulate(map(operator.sub, tokens.starts, firsts), initial=0)
        self._begins = [place - first for place, first in zip(at, firsts, strict=True)]

    @cached_property
    def where(self) -> torch.Tensor:
        """(rows,), int64: where a row's first token lies, or would lie if it were seen."""
        return to_device(self._begins, self.tokens.seats.device)

    @cached_property
    def held(self) -> list[torch.Tensor]:
        of_each = zip(self._begins, self.tokens.starts, strict=True)
        return [torch.arange(begin + self.first_seen(start), begin + start) for begin, start in of_each]


class MarkingLayer(DynamicLayer):  # type: ignore[misc]
    """A layer's part of the cache in one forward; it hands new keys and values on as they are, and knows them again."""

    def __init__(self, window: int | None) -> None:
        super().__init__()
        self.is_sliding, self.sliding_window = window is not None, window

    def attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scores: Scores) -> torch.Tensor:
        """Attend as a kernel does."""
        raise NotImplementedError

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        setattr(key_states, _LAYER, self)
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0


class PackedLayer(MarkingLayer):
    """A layer whose keys and values of before are kept: in pages, or where they were fetched to."""

    def __init__(self, memory: tuple[torch.Tensor, ...], view: View, kernel: AttentionKernel) -> None:
        """memory: keys and values of before, (places, heads, width) each; those that are codes of a byte (int8) have
        their scales beside them, (places, heads, 1) each, float32."""
        super().__init__(view.window)
        self.memory, self.view, self.kernel = memory, view, kernel
        self.into: torch.Tensor | None = None
        """Where a kernel may write what it returns, in place of memory of its own."""

    def attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scores: Scores) -> torch.Tensor:
        """Attend as a kernel does."""
        return self.kernel(self, query, keys, values, scores)

    def result(self, query: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Memory for what a kernel returns."""
        return query.new_empty(query.shape[1], query.shape[0], values.shape[2]) if self.into is None else self.into

    def write(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write new keys and values, (kv heads, tokens, width) each, into the pages of their rows, if they have any."""
        if (places := self.view.places) is not None:
            for memory, states in zip(self.memory, (keys, values), strict=True):
                memory.index_copy_(0, places, states.transpose(0, 1))

    def held(self, row: int, dtype: torch.dtype) -> list[torch.Tensor]:
        """Keys and values of before that a row sees: (kv heads, keys, width) each, on the CPU alone."""
        parts = [memory.index_select(0, self.view.held[row]).transpose(0, 1) for memory in self.memory]
        if len(parts) == 2:
            return parts
        return [(codes * scales).to(dtype) for codes, scales in zip(parts[:2], parts[2:], strict=True)]


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers calls. query: (1, heads, tokens, width); key, value: (1, kv heads,
    tokens, width).

    Returns (1, tokens, heads, width of values). Raises RuntimeError where anything is handed over that it does not
    understand, which `zeroinf.model.packing` would have found.
    """
    layer: MarkingLayer | None = getattr(key, _LAYER, None)
    if layer is None or attention_mask is not None or (more and not_understood(more)):
        raise RuntimeError(f"{type(module).__name__} hands attention what packed forwards do not understand")
    scale = scaling if scaling is not None else query.shape[3] ** -0.5
    return layer.attend(query[0], key[0], value[0], Scores(scale, softcap, s_aux))[None], None


AttentionInterface.register(IMPLEMENTATION, attend)


def parts_elements(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, parts: int) -> int:
    """Numbers that so many programs leave which share the keys of decode steps: a sum of values for each head of a
    group, and what it is to be divided by."""
    return parts * (query.shape[0] // keys.shape[0]) * (values.shape[2] + 2)


def kernel_for(device: torch.device) -> AttentionKernel:
    """The kernel of `device`."""
    if device.type != "cuda":
        return attend_in_torch
    from zeroinf.generation.attention_kernels import attend_on_gpu

    return attend_on_gpu


def attend_in_torch(
    layer: PackedLayer, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scores: Scores
) -> torch.Tensor:
    """Row by row, with torch's own attention: for the CPU."""
    tokens = layer.view.tokens
    out = layer.result(query, values)
    for row, (first, count) in enumerate(zip(tokens.firsts, tokens.counts, strict=True)):
        end = first + count
        seen = [
            torch.cat((held, new[:, first:end]), dim=1)
            for held, new in zip(layer.held(row, keys.dtype), (keys, values), strict=True)
        ]
        sees = _sees(count, seen[0].shape[1] - count, layer.view.window)
        out[first:end] = attend_row(query[:, first:end], seen[0], seen[1], sees, scores).transpose(0, 1)
    layer.write(keys, values)
    return out


def _sees(new: int, held: int, window: int | None) -> torch.Tensor | None:
    """A mask of the keys that each of the `new` queries sees, of `held` ones before them and their own: (new, keys),
    bool; None where they see all."""
    if new == 1:
        return None
    distance = torch.arange(held, held + new)[:, None] - torch.arange(held + new)
    sees = distance >= 0
    return sees if window is None else sees.logical_and_(distance < window)


def attend_row(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, sees: torch.Tensor | None, scores: Scores
) -> torch.Tensor:
    """query: (heads, new, width); keys, values: (kv heads, keys, width). Returns (heads, new, width of values)."""
    if scores.softcap is None and scores.sinks is None:
        attended: torch.Tensor = scaled_dot_product_attention(
            query[None], keys[None], values[None], attn_mask=sees, scale=scores.scale, enable_gqa=True
        )
        return attended[0]
    heads, new, _ = query.shape
    grouped = query.reshape(keys.shape[0], -1, query.shape[2])  # queries of heads that share keys, one after the other
    products = (grouped @ keys.transpose(1, 2)).float().mul_(scores.scale).view(heads, new, -1)
    if scores.softcap is not None:
        products = products.div_(scores.softcap).tanh_().mul_(scores.softcap)
    if sees is not None:
        products.masked_fill_(~sees, float("-inf"))
    if scores.sinks is not None:
        products = torch.cat((products, scores.sinks.float()[:, None, None].expand(heads, new, 1)), dim=-1)
    weights = products.softmax(dim=-1)[..., : keys.shape[1]].to(values.dtype)
    return (weights.reshape(keys.shape[0], -1, keys.shape[1]) @ values).view(heads, new, -1)
