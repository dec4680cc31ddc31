"""Log-likelihoods of given tokens: sequences that run through one forward, whose scores become one number a token."""

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


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """`tokens`, of which those from `start` on are scored; `done` receives what comes of it."""

    tokens: Sequence[int]
    start: int
    done: Callable[[TokenScores], None]


class Scorer:
    """A hook on a model that makes its scores into likelihoods as soon as a forward is through.

    In a pass of many forwards no more than one of them has its scores at a time.
    """

    def __init__(self, model: Any, pad_token: int, device: torch.device) -> None:
        self.pad_token, self.device = pad_token, device
        self.takes_keep = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._kept: dict[int, int] = {}
        """Positions wanted of each forward under way, by where its input lies."""
        self._hook = model.register_forward_hook(self._reduce, with_kwargs=True)

    def expect(self, ids: torch.Tensor, kept: int) -> None:
        """The forward of `ids` (rows, tokens) shall end in the likelihoods of its last `kept` tokens."""
        self._kept[ids.data_ptr()] = kept

    def forget(self, ids: torch.Tensor) -> None:
        """The forward of `ids` is over, well or badly."""
        self._kept.pop(ids.data_ptr(), None)

    def _reduce(self, model: Any, args: tuple[Any, ...], inputs: dict[str, Any], output: Any) -> Any:
        ids = inputs.get("input_ids")
        kept = None if ids is None else self._kept.get(ids.data_ptr())
        if ids is None or kept is None:
            return None
        return _scores(output.logits[:, -kept - 1 : -1], ids[:, -kept:])

    def close(self) -> None:
        self._hook.remove()


def _scores(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Of logits (rows, positions, vocabulary) and the tokens that follow: (rows, positions, 2), float32: the token's
    log-probability, and 1 where it is the likeliest."""
    found = []
    for start in range(0, tokens.shape[1], _POSITIONS):
        part, own = logits[:, start : start + _POSITIONS], tokens[:, start : start + _POSITIONS, None]
        logs = part.log_softmax(dim=-1, dtype=torch.float32)
        best = part.argmax(dim=-1, keepdim=True) == own
        found.append(torch.cat((logs.gather(2, own), best.float()), dim=2))
    return torch.cat(found, dim=1)


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
        """Positions of which scores are kept."""
        return self.width - min(each.start for each in self.sequences)

    def inputs(self) -> dict[str, Any]:
        """Arguments of the model's forward."""
        width, scorer = self.width, self._scorer
        flat = [t for each in self.sequences for t in (*each.tokens, *[scorer.pad_token] * (width - len(each.tokens)))]
        if self._ids is not None:
            scorer.forget(self._ids)
        self._ids = to_device(flat, scorer.device).view(-1, width)
        scorer.expect(self._ids, self.kept)
        keep = {"logits_to_keep": self.kept + 1} if scorer.takes_keep else {}
        return {"input_ids": self._ids, "use_cache": False, **keep}

    def accept(self, scores: torch.Tensor) -> None:
        """Give each sequence what came of it."""
        assert self._ids is not None
        self._scorer.forget(self._ids)
        told, width, kept = scores.tolist(), self.width, self.kept
        for each, row in zip(self.sequences, told, strict=True):
            own = row[each.start - (width - kept) : len(each.tokens) - (width - kept)]
            each.done(TokenScores(tuple(log for log, _ in own), all(best for _, best in own)))

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
