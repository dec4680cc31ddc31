"""Chooses the next token of each row from the scores of its last position."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from zeroinf.generation.row import Likelihood, Row, Sampling
from zeroinf.generation.upload import to_device


def choose_tokens(scores: torch.Tensor, rows: Sequence[Row], numbers: Sequence[int]) -> torch.Tensor:
    """The next token of each row. scores: (rows, vocabulary), float32, or of any dtype where all rows are greedy.

    `numbers` says which of its tokens each row is given, counted from 0. Returns (rows,), int64, on the same device.
    Greedy rows take the highest score, the first of several. The others draw from their own random numbers, so a row's
    sample depends on nothing but its scores, its seed, its place in the input and the token's place in it.
    """
    tokens = scores.argmax(dim=-1)
    for filters, members in _by_filter(rows).items():
        index = to_device(members, scores.device)
        drawn = _draw(_warpers(*filters)(None, scores[index]), [rows[i].draw(numbers[i]) for i in members])
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
        """A copy in host memory, once the device has come so far."""
        logs, tokens = (each.to("cpu", non_blocking=True) for each in (self.logs, self.tokens))
        return replace(self, logs=logs, tokens=tokens)

    def by_place(self) -> dict[int, Likelihood]:
        """The likelihood for each row, by its place."""
        told = zip(self.places, self.counts, self.logs.tolist(), self.tokens.tolist(), strict=True)
        return {
            place: Likelihood(own, tuple(zip(tokens, top, strict=True))[:count])
            for place, count, (own, *top), tokens in told
        }


def likelihoods_of(scores: torch.Tensor, chosen: torch.Tensor, rows: Sequence[Row]) -> Likelihoods | None:
    """The likelihoods that the model's own scores give the tokens `chosen` for `rows`; None where no row asks.

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


def alter_scores(
    scores: torch.Tensor, rows: Sequence[Row], tokens: torch.Tensor, known: Sequence[int], ends: frozenset[int]
) -> torch.Tensor:
    """The scores as the rows' own settings want them: biases, least lengths and penalties, in vLLM's order.

    scores: (rows, vocabulary), of any dtype; tokens: (rows, width), int64, those of prompts and completions, of which
    each row has as many as `known` says; `ends`: the end-of-sequence tokens. What comes back is float32, or `scores`
    themselves where no row asks for anything.
    """
    if not any(row.sampling.alters_scores for row in rows):
        return scores
    scores = scores.to(torch.float32, copy=True)
    biased = [(i, token, bias) for i, row in enumerate(rows) for token, bias in row.sampling.logit_bias]
    biased += [
        (i, token, -torch.inf)
        for i, row in enumerate(rows)
        if known[i] - len(row.prompt) < row.sampling.min_tokens
        for token in {*row.sampling.stop_token_ids, *ends}
        if token < scores.shape[1]
    ]
    if biased:
        where, which, by = zip(*biased, strict=True)
        places = to_device(where, scores.device), to_device(which, scores.device)
        scores.index_put_(places, to_device(by, scores.device, torch.float32), accumulate=True)
    if members := [i for i, row in enumerate(rows) if row.sampling.penalizes]:
        index = to_device(members, scores.device)
        own = [rows[i] for i in members]
        lengths = [known[i] for i in members]
        penalized = _penalized(scores.index_select(0, index), own, tokens.index_select(0, index), lengths)
        scores.index_copy_(0, index, penalized)
    return scores


def _penalized(scores: torch.Tensor, rows: Sequence[Row], tokens: torch.Tensor, known: Sequence[int]) -> torch.Tensor:
    """Scores less their penalties, in place. A place behind a row's last token stands for its first one, again."""

    def column(values: Sequence[float], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return to_device(values, scores.device, dtype)[:, None]

    width = min(max(known), tokens.shape[1])  # rows of a simulated forward may be longer than any of the job
    places = torch.arange(width, device=scores.device)[None]
    tokens = torch.where(places < column(known, torch.int64), tokens[:, :width], tokens[:, :1])
    repeated = scores.gather(1, tokens)
    by = column([row.sampling.repetition_penalty for row in rows])
    scores.scatter_(1, tokens, torch.where(repeated < 0, repeated * by, repeated / by))
    prompts = column([len(row.prompt) for row in rows], torch.int64)
    generated = (places >= prompts) & (places < column(known, torch.int64))
    frequency = column([row.sampling.frequency_penalty for row in rows])
    scores.scatter_add_(1, tokens, torch.where(generated, -frequency, 0.0))
    # A token counts for presence where it stands first among those generated; others take off nothing.
    presence = column([row.sampling.presence_penalty for row in rows])
    scores.scatter_add_(1, tokens, torch.where(generated & _first(tokens, generated), -presence, 0.0))
    return scores


def _first(tokens: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """A mask of the first places of each row's counted tokens: (rows, width), bool."""
    marked = torch.where(counted, tokens, -1)
    ordered, places = marked.sort(dim=1, stable=True)
    fresh = torch.ones_like(ordered, dtype=torch.bool)
    fresh[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return torch.zeros_like(fresh).scatter_(1, places, fresh)


def _by_filter(rows: Sequence[Row]) -> dict[tuple[float, int, float, float], list[int]]:
    groups: dict[tuple[float, int, float, float], list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        s: Sampling = row.sampling
        if not s.is_greedy:
            groups[s.temperature, s.top_k, s.top_p, s.min_p].append(i)
    return groups


def _warpers(temperature: float, top_k: int, top_p: float, min_p: float) -> LogitsProcessorList:
    """transformers' own filters, in its own order."""
    warpers = LogitsProcessorList()
    if temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(temperature))
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    return warpers


def _draw(scores: torch.Tensor, uniform: Sequence[float]) -> torch.Tensor:
    """Invert each row's cumulative distribution at its own random number."""
    cumulative = scores.softmax(dim=-1, dtype=torch.float32).cumsum(dim=-1)
    total = cumulative[:, -1:]
    targets = to_device(uniform, scores.device, torch.float32)[:, None] * total
    # Rounded up to the total, a target would lie beyond every token, filtered ones included.
    targets = targets.minimum(total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, targets, right=True).squeeze(-1)
