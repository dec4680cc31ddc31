"""Runs the harness's requests through a session: contexts that are scored, and prompts that are completed.

Contexts that differ in their last token only are computed once. A few passes' worth of work is submitted at a time, the
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


@dataclass(frozen=True, slots=True)
class ScoredContext:
    """Requests that one forward answers: their tokens are the same except for the last one."""

    packed: bytes
    """All but the last token."""
    scored: int
    """Tokens of the continuation."""
    members: list[tuple[int, int]]
    """Which requests, and the last token of each."""
    following: list[int]
    """The last tokens, each once."""

    @property
    def length(self) -> int:
        """Tokens of the forward."""
        return len(self.packed) // array("I").itemsize

    @property
    def tokens(self) -> list[int]:
        unpacked = array("I")
        unpacked.frombytes(self.packed)
        return unpacked.tolist()


def grouped(requests: Sequence[tuple[Any, list[int], list[int]]], max_length: int) -> list[ScoredContext]:
    """What is to be computed for `requests`, the longest first; of what is too long, the beginning is left out."""
    groups: dict[tuple[bytes, int], ScoredContext] = {}
    cut = 0
    for index, (_, context, continuation) in enumerate(requests):
        if not context or not continuation:
            raise InputError(f"request {index} of the tasks has no tokens in its context or continuation")
        if len(continuation) > max_length:
            raise InputError(f"a continuation of {len(continuation)} tokens, but the context holds {max_length}")
        cut += len(context) + len(continuation) > max_length + 1
        tokens = [*context, *continuation][-max_length - 1 :]
        packed = array("I", tokens[:-1]).tobytes()
        group = groups.setdefault((packed, len(continuation)), ScoredContext(packed, len(continuation), [], []))
        group.members.append((index, tokens[-1]))
        if tokens[-1] not in group.following:
            group.following.append(tokens[-1])
    if cut:
        _log.warning("%d contexts are longer than %d tokens and lose their beginnings", cut, max_length)
    return sorted(groups.values(), key=lambda each: each.length, reverse=True)


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
            sequences = [(each.tokens, each.length - each.scored + 1) for each in part]
            futures = session.service.score(sequences, [each.following for each in part])
            waiting += zip(part, futures, strict=True)
        each, future = waiting.popleft()
        yield each, future.result()
        under_way -= each.length


def answer(scores: TokenScores, number: int) -> tuple[float, bool]:
    log, is_likeliest = scores.following[number]
    total = math.fsum((*scores.logprobs, log))
    if math.isnan(total):
        raise ZeroinfError(NOT_NUMBERS, hint=NOT_NUMBERS_HINT)
    return total, scores.is_greedy and is_likeliest


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
