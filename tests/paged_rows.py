"""Rows whose keys and values come into pages part by part, and what they should attend to."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from zeroinf.generation.attention import Kernel, PackedLayer, PackedView, Scores, tokens_of
from zeroinf.model.anatomy import PAGE_TOKENS


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
        self, counts: dict[int, int], scores: Scores, kernel: Kernel
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """What the next `counts` tokens of rows, by seat, attend to, and what they should."""
        seats, starts = list(counts), [self.done[seat] for seat in counts]
        tokens = tokens_of(seats, starts, list(counts.values()), self.pages.device)
        layer = PackedLayer(self.memory, PackedView(tokens, self.pages, self.window), kernel)
        whose = list(zip(seats, starts, tokens.firsts, strict=True))
        parts = [[each[start : start + counts[seat]] for each in self.states[seat]] for seat, start, _ in whose]
        query, keys, values = (torch.cat(each).transpose(0, 1) for each in zip(*parts, strict=True))
        found = layer.attend(query, keys, values, scores)
        for seat, start, first in whose:
            end = self.done[seat] = start + counts[seat]
            expected = written_out(*(each[:end].float() for each in self.states[seat]), self.window, scores)
            yield found[first : first + counts[seat]], expected[start:]


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
