"""Runs the harness's requests through a session: contexts that are scored, and prompts that are completed.

Continuations of one context share its forward where the model's forwards are packed; where they are padded, those do
that differ in their last token only. A few passes' worth of work is submitted at a time, the
longest first, so that long lists take little memory.
"""

from __future__ import annotations

import logging
import math
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

from zeroinf.errors import InputError, ZeroinfError
from zeroinf.generation.row import Sampling
from zeroinf.generation.scoring import TokenScores
from zeroinf.runs.session import Session
from zeroinf.service.handles import Handle
from zeroinf.service.requests import NOT_NUMBERS, NOT_NUMBERS_HINT

_log = logging.getLogger("lm_eval.zeroinf")
_AHEAD = 4
"""Passes' worth of work that is submitted and has not ended."""


_MOST_TOGETHER = 2
"""A context with its continuations takes at most so many times the tokens of the longest request alone."""


@dataclass(frozen=True, slots=True)
class ScoredContext:
    """Requests that share one forward: the tokens of all of them begin alike."""

    packed: bytes
    """The tokens that they share."""
    scored: int
    """How many of those belong to the continuation, and are scored."""
    members: list[tuple[int, int]]
    """Which requests, and which of the `following` is theirs."""
    following: list[tuple[int, ...]]
    """What comes behind, each once."""

    @property
    def shared(self) -> int:
        """Tokens that they share."""
        return len(self.packed) // array("I").itemsize

    @property
    def length(self) -> int:
        """Tokens of the forward."""
        return self.shared + sum(len(each) - 1 for each in self.following)

    @property
    def scores(self) -> int:
        """Tokens that are scored."""
        return self.scored + sum(map(len, self.following))

    @property
    def tokens(self) -> list[int]:
        unpacked = array("I")
        unpacked.frombytes(self.packed)
        return unpacked.tolist()


def grouped(
    requests: Sequence[tuple[Any, list[int], list[int]]], max_length: int, *, shares_contexts: bool
) -> list[ScoredContext]:
    """The contexts to be computed for `requests`, the longest first; one that is too long loses its beginning.

    With `shares_contexts` requests share their context, else all but their last token.
    """
    groups: dict[tuple[bytes, int], ScoredContext] = {}
    found: list[ScoredContext] = []
    most = _MOST_TOGETHER * max((min(len(c) + len(t), max_length) for _, c, t in requests), default=0)
    cut = 0
    for index, (_, context, continuation) in enumerate(requests):
        if not context or not continuation:
            raise InputError(f"request {index} of the tasks has no tokens in its context or continuation")
        if len(continuation) > max_length:
            raise InputError(f"a continuation of {len(continuation)} tokens, but the context holds {max_length}")
        cut += len(context) + len(continuation) > max_length + 1
        tokens = [*context, *continuation][-max_length - 1 :]
        behind = len(continuation) if shares_contexts else 1
        packed, following = array("I", tokens[:-behind]).tobytes(), tuple(tokens[-behind:])
        key = packed, len(continuation) - behind
        group = groups.get(key)
        if group is None or (following not in group.following and group.length + behind - 1 > most):
            group = groups[key] = ScoredContext(packed, key[1], [], [])
            found.append(group)
        if following not in group.following:
            group.following.append(following)
        group.members.append((index, group.following.index(following)))
    if cut:
        _log.warning("%d contexts are longer than %d tokens and lose their beginnings", cut, max_length)
    return sorted(found, key=lambda each: each.length, reverse=True)


def scored_of(session: Session, asked: Sequence[ScoredContext]) -> Iterator[tuple[ScoredContext, TokenScores]]:
    """Scores as they come; a few passes' worth is under way at a time."""
    room = _AHEAD * session.plan.streams * max(1, session.plan.prefill_tokens)
    waiting: deque[tuple[ScoredContext, Future[TokenScores]]] = deque()
    under_way = 0
    left = deque(asked)
    while left or waiting:
        part = []
        while left and (under_way == 0 or under_way + left[0].length <= room):
            part.append(left.popleft())
            under_way += part[-1].length
        if part:
            sequences = [(each.tokens, each.shared - each.scored) for each in part]
            futures = session.service.score(sequences, [each.following for each in part])
            waiting += zip(part, futures, strict=True)
        each, future = waiting.popleft()
        yield each, future.result()
        under_way -= each.length


def answer(scores: TokenScores, number: int) -> tuple[float, bool]:
    following = scores.following[number]
    total = math.fsum((*scores.logprobs, *following.logprobs))
    if math.isnan(total):
        raise ZeroinfError(NOT_NUMBERS, hint=NOT_NUMBERS_HINT)
    return total, scores.is_greedy and following.is_greedy


@dataclass(frozen=True, slots=True)
class Prompt:
    index: int
    tokens: list[int]
    sampling: Sampling


def completed(session: Session, prompts: Sequence[Prompt]) -> Iterator[tuple[Prompt, str]]:
    """Completions as they end, the longest prompts first; some batches are under way at a time."""
    plan, ended = session.plan, SimpleQueue[int]()
    order = deque(sorted(prompts, key=lambda prompt: len(prompt.tokens), reverse=True))
    running: dict[int, tuple[Prompt, Handle]] = {}
    try:
        while order or running:
            while order and len(running) < _AHEAD * plan.batch_size * plan.streams:
                prompt = order.popleft()
                handle = session.service.submit(prompt.tokens, prompt.sampling, priority="batch", index=prompt.index)
                running[prompt.index] = prompt, handle
                handle.when_changed(lambda number=prompt.index: ended.put(number))  # type: ignore[misc]
            prompt, handle = running.pop(ended.get())
            completion = handle.result()
            if completion.finish_reason == "error":
                raise ZeroinfError(NOT_NUMBERS, hint=NOT_NUMBERS_HINT)
            yield prompt, completion.text
    finally:
        for _, handle in running.values():
            handle.cancel()
