"""Computes log-likelihoods of given tokens: sequences run through one forward, whose logits are reduced to one number a
token before they take memory.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from zeroinf.generation.upload import to_device

# Positions whose probabilities are computed at a time, in float32.
_POSITIONS = 64


@dataclass(frozen=True, slots=True)
class TokenScores:
    """What a model thinks of given tokens."""

    logprobs: tuple[float, ...]
    """Of each token, given those before it: natural logarithms. NaN where the model's scores are not numbers."""
    is_greedy: bool
    """Whether each of them is the likeliest in its place."""
    following: tuple[tuple[float, bool], ...] = ()
    """Of each token that was asked about behind the last one: its log-probability there, and whether it is the
    likeliest."""


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """`tokens`, of which those from `start` on are scored; `done` receives what comes of it.

    Each of `following` is scored as the token behind the last one: one forward tells of them all.
    """

    tokens: Sequence[int]
    start: int
    done: Callable[[TokenScores], None]
    following: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What a forward shall end in."""

    kept: int
    """So many of its last tokens are scored."""
    following: torch.Tensor | None = None
    """(rows, most) tokens that may follow each row, padded with any."""
    ends: torch.Tensor | None = None
    """(rows,) the place of each row's last token among those kept and the one before them."""


class Scorer:
    """A hook on a model that makes its scores into likelihoods as soon as a forward is through.

    In a pass of many forwards no more than one of them has its scores at a time.
    """

    def __init__(self, model: Any, pad_token: int, device: torch.device) -> None:
        self.pad_token, self.device = pad_token, device
        self.takes_keep = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._wanted: dict[int, _Wanted] = {}
        """Of each forward under way, by where its input lies."""
        self._hook = model.register_forward_hook(self._reduce, with_kwargs=True)

    def expect(self, ids: torch.Tensor, wanted: _Wanted) -> None:
        """The forward of `ids` (rows, tokens) shall end in likelihoods, (rows, scored and following ones, 2)."""
        self._wanted[ids.data_ptr()] = wanted

    def forget(self, ids: torch.Tensor) -> None:
        """The forward of `ids` is over, well or badly."""
        self._wanted.pop(ids.data_ptr(), None)

    def _reduce(self, model: Any, args: tuple[Any, ...], inputs: dict[str, Any], output: Any) -> Any:
        ids = inputs.get("input_ids")
        wanted = None if ids is None else self._wanted.get(ids.data_ptr())
        if ids is None or wanted is None:
            return None
        logits, width = output.logits[:, -wanted.kept - 1 :], ids.shape[1]
        found = _scores(logits[:, :-1], ids[:, width - wanted.kept :])
        if wanted.following is None:
            return found
        last = logits[torch.arange(len(ids), device=ids.device), wanted.ends].unsqueeze(1)
        return torch.cat((found, _scores_of(last, wanted.following.unsqueeze(1)).squeeze(1)), dim=1)

    def close(self) -> None:
        self._hook.remove()


def _scores(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Of logits (rows, positions, vocabulary) and the tokens that follow: (rows, positions, 2), float32: the token's
    log-probability, and 1 where it is the likeliest."""
    parts = [
        _scores_of(logits[:, start : start + _POSITIONS], tokens[:, start : start + _POSITIONS, None]).squeeze(2)
        for start in range(0, tokens.shape[1], _POSITIONS)
    ]
    return torch.cat(parts, dim=1) if parts else torch.zeros(len(tokens), 0, 2, device=tokens.device)


def _scores_of(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Of logits (rows, positions, vocabulary) and some tokens for each (rows, positions, some): (rows, positions, some,
    2)."""
    found = logits.log_softmax(dim=-1, dtype=torch.float32).gather(2, tokens)
    best = logits.argmax(dim=-1, keepdim=True) == tokens
    return torch.stack((found, best.float()), dim=3)


class ScoreBatch:
    """Sequences of one forward, padded on the right: nothing that is scored sees what follows it."""

    def __init__(self, scorer: Scorer, sequences: Sequence[Scored]) -> None:
        self.sequences = sequences
        self._scorer = scorer
        self._ids: torch.Tensor | None = None

    @property
    def width(self) -> int:
        """Columns that are computed."""
        return max(len(each.tokens) for each in self.sequences)

    @property
    def kept(self) -> int:
        """Positions of which scores are kept: from the one before the first that is scored."""
        return self.width - min(each.start for each in self.sequences) + 1

    def inputs(self) -> dict[str, Any]:
        """Arguments of the model's forward."""
        width, scorer = self.width, self._scorer
        flat = [t for each in self.sequences for t in (*each.tokens, *[scorer.pad_token] * (width - len(each.tokens)))]
        if self._ids is not None:
            scorer.forget(self._ids)
        self._ids = to_device(flat, scorer.device).view(-1, width)
        scorer.expect(self._ids, self._wanted())
        keep = {"logits_to_keep": self.kept} if scorer.takes_keep else {}
        return {"input_ids": self._ids, "use_cache": False, **keep}

    def _wanted(self) -> _Wanted:
        kept, width, device = self.kept - 1, self.width, self._scorer.device
        most = max(len(each.following) for each in self.sequences)
        if not most:
            return _Wanted(kept)
        flat = [t for each in self.sequences for t in (*each.following, *[0] * (most - len(each.following)))]
        ends = [len(each.tokens) - 1 - (width - kept - 1) for each in self.sequences]
        return _Wanted(kept, to_device(flat, device).view(-1, most), to_device(ends, device))

    def accept(self, scores: torch.Tensor) -> None:
        """Give each sequence what came of it."""
        assert self._ids is not None
        self._scorer.forget(self._ids)
        told, kept = scores.tolist(), self.kept - 1
        first = self.width - kept
        for each, row in zip(self.sequences, told, strict=True):
            own = row[each.start - first : len(each.tokens) - first]
            following = tuple((log, bool(best)) for log, best in row[kept : kept + len(each.following)])
            each.done(TokenScores(tuple(log for log, _ in own), all(best for _, best in own), following))

    def halves(self) -> Iterator[ScoreBatch]:
        """The same sequences in two batches; one alone comes again as it is."""
        half = -(-len(self.sequences) // 2)
        for part in (self.sequences[:half], self.sequences[half:]):
            if part:
                yield ScoreBatch(self._scorer, part)


def batches_of(
    scorer: Scorer, sequences: Sequence[Scored], *, rows: int, columns: int, kept: int, breaks_at: int | None
) -> Iterator[ScoreBatch]:
    """Like-long sequences together: at most `rows` in a forward, which computes so many `columns` and keeps the scores
    of so many (`kept`) of them at the most, unless a sequence alone has more.

    Beyond `breaks_at` tokens a model computes all keys anew: sequences on both sides of it do not mix.
    """
    ordered = sorted(sequences, key=lambda each: len(each.tokens), reverse=True)
    for _, side in groupby(ordered, lambda each: breaks_at is not None and len(each.tokens) > breaks_at):
        batch: list[Scored] = []
        for each in side:
            longer = ScoreBatch(scorer, [*batch, each])
            count = len(longer.sequences)
            if batch and (count > rows or count * longer.width > columns or count * longer.kept > kept):
                yield ScoreBatch(scorer, batch)
                batch = []
            batch.append(each)
        yield ScoreBatch(scorer, batch)
