"""Rows whose keys and values come into pages, or into host memory, part by part, and what they should attend to."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from zeroinf.generation.attention import AttentionKernel, PackedLayer, PackedView, Scores, StagedView, Tokens, tokens_of
from zeroinf.generation.records import parts, read, write
from zeroinf.model.cache_layout import PAGE_TOKENS, KvDtype, Record, TokenState


class PagedRows:
    """Random rows of `lengths` tokens, in pages that nobody has written before."""

    def __init__(
        self,
        lengths: list[int],
        window: int | None,
        *,
        heads: tuple[int, int] = (4, 2),
        widths: tuple[int, int] = (8, 6),
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """heads: of queries, and of keys and values. widths: of queries and keys, and of values."""
        self.window, self.done = window, [0] * len(lengths)
        kept = max(lengths) if window is None else min(max(lengths), window)
        ring = -(-kept // PAGE_TOKENS)
        self.pages = (torch.randperm(len(lengths) * ring) + 1).view(len(lengths), ring).to(device)
        places = (len(lengths) * ring + 1) * PAGE_TOKENS
        empty = (torch.full((places, heads[1], width), math.nan, dtype=dtype, device=device) for width in widths)
        self.memory = tuple(empty)
        sizes = (heads[0], widths[0]), (heads[1], widths[0]), (heads[1], widths[1])
        self.states = [[torch.randn(length, *size).to(device, dtype) for size in sizes] for length in lengths]

    def attend(
        self, counts: dict[int, int], scores: Scores, kernel: AttentionKernel
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """What the next `counts` tokens of rows, by seat, attend to, and what they should."""
        seats, starts = list(counts), [self.done[seat] for seat in counts]
        tokens = tokens_of(seats, starts, list(counts.values()), self.pages.device)
        layer = self.layer(tokens, seats, kernel)
        whose = list(zip(seats, starts, tokens.firsts, strict=True))
        new = [[each[start : start + counts[seat]] for each in self.states[seat]] for seat, start, _ in whose]
        query, keys, values = (torch.cat(each).transpose(0, 1) for each in zip(*new, strict=True))
        is_told = tokens.total % 2 == 1  # where to write
        layer.into = query.new_empty(query.shape[1], query.shape[0], values.shape[2]) if is_told else None
        found = layer.attend(query, keys, values, scores)
        assert not is_told or found is layer.into
        for seat, start, first in whose:
            end = self.done[seat] = start + counts[seat]
            expected = written_out(*(each[:end].float() for each in self.states[seat]), self.window, scores)
            yield found[first : first + counts[seat]], expected[start:]

    def layer(self, tokens: Tokens, seats: list[int], kernel: AttentionKernel) -> PackedLayer:
        """The part of the cache that the rows of `seats` see and write."""
        return PackedLayer(self.memory, PackedView(tokens, self.pages, self.window), kernel)


class StagedRows(PagedRows):
    """The same as records of `dtype`, of which each row's lie side by side, between some that nobody has written."""

    def __init__(self, lengths: list[int], window: int | None, kv_dtype: KvDtype = "model", **given: Any) -> None:
        super().__init__(lengths, window, **given)
        kinds = [
            TokenState(heads=each.shape[1], width=each.shape[2], dtype=str(each.dtype).removeprefix("torch."))
            for each in self.memory
        ]
        self.record = Record(keys=kinds[0], values=kinds[1], dtype=kv_dtype)
        self.records = []
        for row, (query, keys, values) in enumerate(self.states):
            states = [each.transpose(0, 1)[None] for each in (keys, values)]
            self.records.append(torch.full((1, len(query), self.record.nbytes), 255, dtype=torch.uint8).to(keys.device))
            write(self.record, self.records[-1], *states)
            found = [each[0].transpose(0, 1) for each in read(self.record, self.records[-1])]
            self.states[row] = [query, *found]  # what is attended to has gone through codes

    def layer(self, tokens: Tokens, seats: list[int], kernel: AttentionKernel) -> PackedLayer:
        view = StagedView(tokens, self.window)
        of_each = zip(seats, tokens.starts, strict=True)
        seen = [self.records[seat][0, view.first_seen(start) : start] for seat, start in of_each]
        held = torch.cat([*seen, torch.full_like(self.records[0][0, :1], 255)])
        return PackedLayer(parts(self.record, held), view, kernel)


def written_out(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int | None, scores: Scores
) -> torch.Tensor:
    """Attention of all of a row at once: (tokens, heads, width) each."""
    keys, values = (each.repeat_interleave(query.shape[1] // each.shape[1], dim=1) for each in (keys, values))
    products = torch.einsum("qhd,khd->hqk", query, keys) * scores.scale
    if scores.softcap is not None:
        products = torch.tanh(products / scores.softcap) * scores.softcap
    at = torch.arange(len(query), device=query.device)
    distance = at[:, None] - at
    sees = (distance >= 0) & (distance < (len(query) if window is None else window))
    products = products.masked_fill(~sees, -math.inf)
    if scores.sinks is not None:
        sinks = scores.sinks.float()[:, None, None].expand(-1, len(query), 1)
        products = torch.cat([products, sinks], dim=-1)
    return torch.einsum("hqk,khd->qhd", products.softmax(-1)[..., : len(keys)], values)
