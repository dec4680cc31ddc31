"""Log-likelihoods of given tokens: sequences that run through one forward, whose logits become one number a token.

A sequence may have several continuations, which share its forward. Where the model takes packed forwards, sequences lie
side by side as one, each with its continuations behind it, and every token sees what precedes it in
its own sequence and continuation; nothing is kept for later forwards. Else sequences are padded on the right.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache

from zeroinf.generation.attention import MarkingLayer, Scores, attend_row
from zeroinf.generation.upload import to_device
from zeroinf.model.kv import cache_name
from zeroinf.model.packing import windows_of

# Tokens whose probabilities are computed at a time, in float32.
_TOKENS = 64


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Log-likelihoods of given tokens."""

    logprobs: tuple[float, ...]
    """Of each token, given those before it: natural logarithms. NaN where the model's scores are not numbers."""
    is_greedy: bool
    """Whether each of them is the likeliest in its place."""
    following: tuple[TokenScores, ...] = ()
    """Of each continuation."""
    likeliest: tuple[tuple[int, float], ...] = ()
    """In the place of each token, the likeliest one and its log-probability."""


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """`tokens`, of which those from `start` on are scored; `done` receives what comes of it.

    Each of `following` is a continuation behind the last token, and scored as if it were the only one. They have one
    token each where forwards are padded.
    """

    tokens: Sequence[int]
    start: int
    done: Callable[[TokenScores], None]
    following: Sequence[Sequence[int]] = ()

    @property
    def length(self) -> int:
        """Tokens that are computed: the last one of a continuation is not."""
        return len(self.tokens) + sum(len(each) - 1 for each in self.following)

    @property
    def scored(self) -> int:
        """Tokens that are scored."""
        return len(self.tokens) - self.start + sum(map(len, self.following))

    def received(self, scores: Sequence[Sequence[float]]) -> None:
        """Hand on the scores of all its tokens, in order, as `Scorer` leaves them."""
        ends, start = [], 0
        for count in (len(self.tokens) - self.start, *map(len, self.following)):
            ends.append((start, start + count))
            start += count
        own, *following = (_token_scores(scores[first:end]) for first, end in ends)
        self.done(replace(own, following=tuple(following)))


def _token_scores(scores: Sequence[Sequence[float]]) -> TokenScores:
    return TokenScores(
        tuple(log for log, *_ in scores),
        all(best for _, best, *_ in scores),
        likeliest=tuple((int(token), log) for *_, token, log in scores),
    )


@dataclass(frozen=True, slots=True)
class _Wanted:
    """The scores that a forward shall end in: those of `tokens`, (scored,), by the logits in a row and a column,
    (scored,) each.

    Columns count from the last one, which is -1, so that it does not matter how many a model computes.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    tokens: torch.Tensor


class Scorer:
    """A hook on a model that makes its logits into likelihoods as soon as a forward is through.

    In a pass of many forwards no more than one of them has its logits at a time.
    """

    def __init__(self, model: Any, pad_token: int, device: torch.device, *, packs: bool) -> None:
        self.model, self.pad_token, self.device, self.packs = model, pad_token, device, packs
        self.takes_keep = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._wanted: dict[int, _Wanted] = {}
        """Of each forward under way, by where its input lies."""
        self._hook = model.register_forward_hook(self._reduce, with_kwargs=True)

    def expect(self, ids: torch.Tensor, wanted: _Wanted) -> None:
        """The forward of `ids` (rows, tokens) shall end in (scored, 4), float32: each token's log-probability, 1 where
        it is the likeliest, the likeliest token and its log-probability."""
        self._wanted[ids.data_ptr()] = wanted

    def forget(self, ids: torch.Tensor) -> None:
        """The forward of `ids` is over, well or badly."""
        self._wanted.pop(ids.data_ptr(), None)

    def _reduce(self, model: Any, args: tuple[Any, ...], inputs: dict[str, Any], output: Any) -> Any:
        ids = inputs.get("input_ids")
        wanted = None if ids is None else self._wanted.get(ids.data_ptr())
        return None if wanted is None else _scores(output.logits, wanted)

    def close(self) -> None:
        self._hook.remove()


def _scores(logits: torch.Tensor, wanted: _Wanted) -> torch.Tensor:
    """Scores out of logits (rows, columns, vocabulary): (scored, 4)."""
    found = []
    for start in range(0, len(wanted.tokens), _TOKENS):
        part = slice(start, start + _TOKENS)
        of_each, tokens = logits[wanted.rows[part], wanted.columns[part]], wanted.tokens[part, None]
        best = of_each.argmax(dim=-1, keepdim=True)
        logs = of_each.log_softmax(dim=-1, dtype=torch.float32).gather(1, torch.cat((tokens, best), dim=1))
        found.append(torch.cat((logs[:, :1], (best == tokens).float(), best.float(), logs[:, 1:]), dim=1))
    return torch.cat(found)


class ScoreBatch(ABC):
    """Sequences of one forward. `inputs`, a forward, `accept`."""

    is_packed: bool

    def __init__(self, scorer: Scorer, sequences: Sequence[Scored]) -> None:
        self.sequences = sequences
        self._scorer = scorer
        self._ids: torch.Tensor | None = None

    @property
    @abstractmethod
    def columns(self) -> int:
        """Tokens that are computed, padding included."""

    @property
    @abstractmethod
    def kept(self) -> int:
        """Places of which logits are kept."""

    @abstractmethod
    def inputs(self) -> dict[str, Any]:
        """Arguments of the model's forward."""

    def _expect(self, ids: torch.Tensor, rows: Sequence[int], columns: Sequence[int]) -> None:
        """The forward of `ids` ends in scores; the logits of each scored token lie in such a row and column."""
        if self._ids is not None:
            self._scorer.forget(self._ids)
        self._ids = ids
        texts = (part for each in self.sequences for part in (each.tokens[each.start :], *each.following))
        tokens = [token for part in texts for token in part]
        known = to_device([*rows, *columns, *tokens], self._scorer.device).view(3, -1)
        self._scorer.expect(ids, _Wanted(*known))

    def accept(self, scores: torch.Tensor) -> None:
        """Give each sequence what came of it."""
        assert self._ids is not None
        self._scorer.forget(self._ids)
        told = scores.tolist()
        start = 0
        for each in self.sequences:
            each.received(told[start : start + each.scored])
            start += each.scored

    def halves(self) -> Iterator[ScoreBatch]:
        """Split the sequences into two batches; one alone comes again as it is."""
        half = -(-len(self.sequences) // 2)
        for part in (self.sequences[:half], self.sequences[half:]):
            if part:
                yield type(self)(self._scorer, part)


class PaddedScores(ScoreBatch):
    """Sequences padded on the right: nothing that is scored sees what follows it."""

    is_packed = False

    @property
    def width(self) -> int:
        """Columns of the longest."""
        return max(len(each.tokens) for each in self.sequences)

    @property
    def columns(self) -> int:
        return len(self.sequences) * self.width

    @property
    def kept(self) -> int:
        return len(self.sequences) * self._kept_columns

    @property
    def _kept_columns(self) -> int:
        """The number of columns from the one before the first token that is scored."""
        return self.width - min(each.start for each in self.sequences) + 1

    def inputs(self) -> dict[str, Any]:
        width, scorer = self.width, self._scorer
        flat = [t for each in self.sequences for t in (*each.tokens, *[scorer.pad_token] * (width - len(each.tokens)))]
        ids = to_device(flat, scorer.device).view(-1, width)
        rows: list[int] = []
        columns: list[int] = []
        for row, each in enumerate(self.sequences):
            rows += [row] * each.scored
            columns += range(each.start - 1 - width, len(each.tokens) - 1 - width)
            columns += [len(each.tokens) - 1 - width] * len(each.following)
        self._expect(ids, rows, columns)
        keep = {"logits_to_keep": self._kept_columns} if scorer.takes_keep else {}
        return {"input_ids": ids, "use_cache": False, **keep}


@dataclass(frozen=True, slots=True)
class _Span:
    """A sequence's place in a packed forward: its own tokens from `first` to `branches`, then its continuations'."""

    first: int
    branches: int
    end: int


class _WholeView:
    """The keys that tokens of packed sequences see, in layers of one window."""

    def __init__(self, spans: Sequence[_Span], places: torch.Tensor, window: int | None) -> None:
        """places: (2, tokens), int64: the token's place in its text; its continuation, from 1 on, or 0 for none."""
        self.spans, self.window = spans, window
        self._places = places

    @cached_property
    def sees(self) -> list[torch.Tensor]:
        """Masks of each sequence's tokens that each one of its continuations' sees: (queries, keys), bool."""
        found = []
        for span in self.spans:
            (asks, asking), (at, of) = self._places[:, span.branches : span.end], self._places[:, span.first : span.end]
            distance = asks[:, None] - at
            sees = (distance >= 0).logical_and_((of == 0).logical_or(asking[:, None] == of))
            found.append(sees if self.window is None else sees.logical_and_(distance < self.window))
        return found


class PackedScores(ScoreBatch):
    """Sequences side by side as one, each with its continuations behind it: nothing is padded or computed twice."""

    is_packed = True

    @property
    def columns(self) -> int:
        return sum(each.length for each in self.sequences)

    @property
    def kept(self) -> int:
        return sum(each.scored for each in self.sequences)

    def inputs(self) -> dict[str, Any]:
        scorer = self._scorer
        ids: list[int] = []
        places: list[int] = []
        branches: list[int] = []
        spans: list[_Span] = []
        columns: list[int] = []
        for each in self.sequences:
            first, count = len(ids), len(each.tokens)
            ids += each.tokens
            places += range(count)
            branches += [0] * count
            columns += range(first + each.start - 1, first + count - 1)
            for branch, tokens in enumerate(each.following, start=1):
                columns += (first + count - 1, *range(len(ids), len(ids) + len(tokens) - 1))
                ids += tokens[:-1]
                places += range(count, count + len(tokens) - 1)
                branches += [branch] * (len(tokens) - 1)
            spans.append(_Span(first, first + count, len(ids)))
        known = to_device([*ids, *places, *branches], scorer.device).view(3, -1)
        kept = sorted(set(columns)) if scorer.takes_keep else list(range(len(ids)))
        number = {column: index - len(kept) for index, column in enumerate(kept)}
        self._expect(known[:1], [0] * len(columns), [number[column] for column in columns])
        return {
            "input_ids": known[:1],
            "position_ids": known[1:2],
            "use_cache": True,
            cache_name(scorer.model): _whole_cache(scorer.model, spans, known[1:]),
            **({"logits_to_keep": to_device(kept, scorer.device)} if scorer.takes_keep else {}),
        }


class _WholeLayer(MarkingLayer):
    """A layer that keeps nothing: tokens attend within their sequences."""

    def __init__(self, view: _WholeView) -> None:
        super().__init__(view.window)
        self._view = view

    def attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scores: Scores) -> torch.Tensor:
        view = self._view
        out = query.new_empty(query.shape[1], query.shape[0], values.shape[2])
        for index, span in enumerate(view.spans):
            own = slice(span.first, span.branches)
            out[own] = _attend_own(query[:, own], keys[:, own], values[:, own], view.window, scores).transpose(0, 1)
            if span.end > span.branches:
                of, whole = slice(span.branches, span.end), slice(span.first, span.end)
                found = attend_row(query[:, of], keys[:, whole], values[:, whole], view.sees[index], scores)
                out[of] = found.transpose(0, 1)
        return out


def _whole_cache(model: Any, spans: Sequence[_Span], places: torch.Tensor) -> DynamicCache:
    """A cache that keeps nothing: its layers let attention know what sees what."""
    cache, views = DynamicCache(), dict[int | None, _WholeView]()
    cache.layers = []
    for window in windows_of(model):
        view = views.setdefault(window, _WholeView(spans, places, window))
        cache.layers.append(_WholeLayer(view))
    return cache


def _attend_own(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int | None, scores: Scores
) -> torch.Tensor:
    """query: (heads, tokens, width); keys, values: (kv heads, tokens, width). Returns (heads, tokens, width)."""
    count = query.shape[1]
    if scores.softcap is None and scores.sinks is None and (window is None or count <= window):
        attended: torch.Tensor = scaled_dot_product_attention(
            query[None], keys[None], values[None], is_causal=True, scale=scores.scale, enable_gqa=True
        )
        return attended[0]
    at = torch.arange(count, device=query.device)
    distance = at[:, None] - at
    sees = distance >= 0
    return attend_row(query, keys, values, sees if window is None else sees.logical_and_(distance < window), scores)


def batches_of(
    scorer: Scorer, sequences: Sequence[Scored], *, rows: int, columns: int, kept: int, breaks_at: int | None
) -> Iterator[ScoreBatch]:
    """Like-long sequences together: at most `rows` in a padded forward; any forward computes so many `columns` and
    keeps the logits of so many (`kept`) of them at the most, unless a sequence alone has more.

    Beyond `breaks_at` tokens a model computes all keys anew: sequences on both sides of it do not mix.
    """
    kind = PackedScores if scorer.packs else PaddedScores
    ordered = sorted(sequences, key=lambda each: each.length, reverse=True)
    for _, side in groupby(ordered, lambda each: breaks_at is not None and len(each.tokens) > breaks_at):
        batch: list[Scored] = []
        for each in side:
            longer = kind(scorer, [*batch, each])
            if batch and ((len(batch) == rows and not scorer.packs) or longer.columns > columns or longer.kept > kept):
                yield kind(scorer, batch)
                batch = []
            batch.append(each)
        yield kind(scorer, batch)
