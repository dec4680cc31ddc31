"""Attention over pages against the same written out, for all that models ask of it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zeroinf.generation.attention import PackedLayer, PackedView, Scores, attend, attend_in_torch, tokens_of
from zeroinf.model.anatomy import PAGE_TOKENS

CPU = torch.device("cpu")
HEADS, KV_HEADS, WIDTH, VALUE_WIDTH = 4, 2, 8, 6


def written_out(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int | None, scores: Scores
) -> torch.Tensor:
    """All of a row at once: (tokens, heads, width) each."""
    keys, values = (each.repeat_interleave(HEADS // KV_HEADS, dim=1) for each in (keys, values))
    products = torch.einsum("qhd,khd->hqk", query, keys) * scores.scale
    if scores.softcap is not None:
        products = torch.tanh(products / scores.softcap) * scores.softcap
    distance = torch.arange(len(query))[:, None] - torch.arange(len(keys))
    sees = (distance >= 0) & (distance < (math.inf if window is None else window))
    products = products.masked_fill(~sees, -math.inf)
    if scores.sinks is not None:
        products = torch.cat([products, scores.sinks[:, None, None].expand(-1, len(query), 1)], dim=-1)
    return torch.einsum("hqk,khd->qhd", products.softmax(-1)[..., : len(keys)], values)


class Rows:
    """Rows whose keys and values come into pages part by part, in pages that nobody has written before."""

    def __init__(self, lengths: list[int], window: int | None) -> None:
        self.window, self.done = window, [0] * len(lengths)
        kept = max(lengths) if window is None else min(max(lengths), window)
        ring = -(-kept // PAGE_TOKENS)
        order = torch.randperm(len(lengths) * ring) + 1
        self.pages = order.view(len(lengths), ring)
        places = (len(lengths) * ring + 1) * PAGE_TOKENS
        self.memory = tuple(torch.full((places, KV_HEADS, width), math.nan) for width in (WIDTH, VALUE_WIDTH))
        sizes = (HEADS, WIDTH), (KV_HEADS, WIDTH), (KV_HEADS, VALUE_WIDTH)
        self.states = [[torch.randn(length, *size) for size in sizes] for length in lengths]

    def attend(self, counts: dict[int, int], scores: Scores) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """What the next `counts` tokens of rows, by seat, attend to, and what they should."""
        seats, starts = list(counts), [self.done[seat] for seat in counts]
        tokens = tokens_of(seats, starts, list(counts.values()), CPU)
        layer = PackedLayer(self.memory, PackedView(tokens, self.pages, self.window), attend_in_torch)
        whose = list(zip(seats, starts, tokens.firsts, strict=True))
        parts = [[each[start : start + counts[seat]] for each in self.states[seat]] for seat, start, _ in whose]
        query, keys, values = (torch.cat(each).transpose(0, 1) for each in zip(*parts, strict=True))
        found = layer.attend(query, keys, values, scores)
        for seat, start, first in whose:
            end = self.done[seat] = start + counts[seat]
            expected = written_out(*(each[:end] for each in self.states[seat]), self.window, scores)
            yield found[first : first + counts[seat]], expected[start:]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=4),
    window=st.sampled_from([None, 1, 7, 16, 33]),
    softcap=st.sampled_from([None, 2.0]),
    has_sinks=st.booleans(),
    draw=st.data(),
)
def test_rows_attend_to_their_own_tokens_however_they_are_cut(
    lengths: list[int], window: int | None, softcap: float | None, has_sinks: bool, draw: st.DataObject
) -> None:
    torch.manual_seed(0)
    rows = Rows(lengths, window)
    scores = Scores(0.3, softcap, torch.randn(HEADS) if has_sinks else None)
    while left := {seat: length - rows.done[seat] for seat, length in enumerate(lengths) if length > rows.done[seat]}:
        seats = draw.draw(st.lists(st.sampled_from(sorted(left)), min_size=1, unique=True))
        counts = {seat: draw.draw(st.one_of(st.just(1), st.integers(1, left[seat]))) for seat in seats}
        for found, expected in rows.attend(counts, scores):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_what_is_handed_over_beside_that_is_refused() -> None:
    with pytest.raises(RuntimeError, match="Linear hands attention what packed forwards do not understand"):
        attend(torch.nn.Linear(1, 1), *(torch.zeros(1, 1, 1, 1),) * 3, None)
