"""Choosing the next token of each row."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from zeroinf.generation.row import Likelihood, Row, Sampling
from zeroinf.generation.upload import to_device


def choose_tokens(scores: torch.Tensor, rows: Sequence[Row], numbers: Sequence[int]) -> torch.Tensor:
    """The next token of each row. scores: (rows, vocabulary), float32, or of any dtype where all rows are greedy.

    `numbers` says which of its tokens each row is given, counted from 0. Returns (rows,), int64, on the same device.
    Greedy rows take the highest score, the first of several. The others draw from their own random numbers, so a row's
    sample depends on nothing but its scores, its seed, its place in the input and the token's place in it.
    """
    tokens = scores.argmax(dim=-1)
    for (temperature, top_k, top_p), members in _by_filter(rows).items():
        index = to_device(members, scores.device)
        drawn = _draw(
            _warpers(temperature, top_k, top_p)(None, scores[index]), [rows[i].draw(numbers[i]) for i in members]
        )
        tokens[index] = drawn
    return tokens


@dataclass(frozen=True, slots=True)
class Likelihoods:
    """Log-probabilities of the tokens chosen for the rows at `places`, and of the likeliest ones."""

    places: Sequence[int]
    counts: Sequence[int]
    """How many of the likeliest each row asks for."""
    logs: torch.Tensor
    """(places, 1 + most of counts), float32: the chosen token's, then those of the likeliest."""
    tokens: torch.Tensor
    """(places, most of counts), int64: the likeliest."""

    def to_host(self) -> Likelihoods:
        """The same in host memory, once the device has come so far."""
        logs, tokens = (each.to("cpu", non_blocking=True) for each in (self.logs, self.tokens))
        return replace(self, logs=logs, tokens=tokens)

    def by_place(self) -> dict[int, Likelihood]:
        """What each row is told."""
        told = zip(self.places, self.counts, self.logs.tolist(), self.tokens.tolist(), strict=True)
        return {
            place: Likelihood(own, tuple(zip(tokens, top, strict=True))[:count])
            for place, count, (own, *top), tokens in told
        }


def likelihoods_of(scores: torch.Tensor, chosen: torch.Tensor, rows: Sequence[Row]) -> Likelihoods | None:
    """What the model's own scores say of the tokens `chosen` for `rows`; None where no row asks.

    scores: (rows, vocabulary), of any dtype, as the model gave them; chosen: (rows,), int64.
    """
    asked = {place: row.sampling.logprobs for place, row in enumerate(rows)}
    counts = {place: count for place, count in asked.items() if count is not None}
    if not counts:
        return None
    places = list(counts)
    if len(places) < len(rows):
        index = to_device(places, scores.device)
        scores, chosen = scores.index_select(0, index), chosen.index_select(0, index)
    logs = scores.log_softmax(dim=-1, dtype=torch.float32)
    top = logs.topk(min(max(counts.values()), logs.shape[1]))
    own = logs.gather(1, chosen[:, None])
    return Likelihoods(places, list(counts.values()), torch.cat((own, top.values), dim=1), top.indices)


def _by_filter(rows: Sequence[Row]) -> dict[tuple[float, int, float], list[int]]:
    groups: dict[tuple[float, int, float], list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        s: Sampling = row.sampling
        if not s.is_greedy:
            groups[s.temperature, s.top_k, s.top_p].append(i)
    return groups


def _warpers(temperature: float, top_k: int, top_p: float) -> LogitsProcessorList:
    """transformers' own filters, in its own order."""
    warpers = LogitsProcessorList()
    if temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(temperature))
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        warpers.append(TopPLogitsWarper(top_p))
    return warpers


def _draw(scores: torch.Tensor, uniform: Sequence[float]) -> torch.Tensor:
    """Invert each row's cumulative distribution at its own random number."""
    cumulative = scores.softmax(dim=-1, dtype=torch.float32).cumsum(dim=-1)
    total = cumulative[:, -1:]
    targets = to_device(uniform, scores.device, torch.float32)[:, None] * total
    # Rounded up to the total, a target would lie beyond every token, filtered ones included.
    targets = targets.minimum(total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, targets, right=True).squeeze(-1)
