"""One sequence on its way: what was asked, what has been generated, and why it ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Literal

Decode = Callable[[Sequence[int]], str]
FinishReason = Literal["stop", "length", "error"]

NO_TOKEN = -1
"""Chosen where the model's scores are not numbers, and there is nothing to choose by."""

MOST_LOGPROBS = 20
"""As many likely tokens as OpenAI's API tells."""

# Tokens may hold a part of a character, so the text that ends in a stop string can reach back a little further than
# one token a character.
_STOP_MARGIN_TOKENS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the next token is chosen and when a row ends.

    `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 do not filter; `seed` makes a row's sample its own, whatever its
    neighbours. Raises ValueError naming the field.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    """Tell each token's log-probability, and those of so many of the likeliest; None: tell none."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if not 0.0 <= self.temperature <= 100.0:
            raise ValueError(f"temperature must lie between 0 and 100, not {self.temperature}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must lie above 0 and at most at 1, not {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or more, not {self.top_k}")
        if self.logprobs is not None and not 0 <= self.logprobs <= MOST_LOGPROBS:
            raise ValueError(f"logprobs must lie between 0 and {MOST_LOGPROBS}, not {self.logprobs}")
        if any(not text for text in self.stop):
            raise ValueError("stop holds an empty string")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True)
class Likelihood:
    """What the model thought of a token before it was chosen."""

    logprob: float
    top: tuple[tuple[int, float], ...]
    """The likeliest tokens with their log-probabilities, the likeliest first."""


@dataclass(slots=True)
class Row:
    """A request's tokens: `prompt` as given, `generated` as it grows (an end-of-sequence token included).

    Where an encoder reads what was given, that is `source`, and `prompt` is what the decoder begins with.
    """

    index: int
    prompt: Sequence[int]
    sampling: Sampling
    decode: Decode
    source: Sequence[int] = ()
    generated: list[int] = field(default_factory=list)
    likelihoods: list[Likelihood] = field(default_factory=list)
    """Of each generated token, where `sampling.logprobs` asks for them."""
    finish_reason: FinishReason | None = None
    text: str = ""

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def draw(self, number: int) -> float:
        """The random number for this row's token `number`, uniform in [0, 1): the same however often it is asked."""
        digest = blake2b(f"{self.sampling.seed}/{self.index}/{number}".encode(), digest_size=8).digest()
        return (int.from_bytes(digest) >> 11) / 2**53

    def accept(self, token: int, eos_tokens: frozenset[int]) -> None:
        """Take the next token; sets `finish_reason` and `text` when the row ends with it.

        With NO_TOKEN it ends in error, and its tokens never become text.
        """
        if token == NO_TOKEN:
            self.finish_reason = "error"
            return
        self.generated.append(token)
        ends = token in eos_tokens and not self.sampling.ignore_eos
        if ends or self._hits_stop():
            self._finish("stop")
        elif len(self.generated) == self.sampling.max_new_tokens:
            self._finish("length")

    def _hits_stop(self) -> bool:
        if not self.sampling.stop:
            return False
        reach = max(len(text.encode()) for text in self.sampling.stop) + _STOP_MARGIN_TOKENS
        tail = self.decode(self.generated[-reach:])
        return any(text in tail for text in self.sampling.stop)

    def _finish(self, reason: FinishReason) -> None:
        self.finish_reason = reason
        text = self.decode(self.generated)
        ends = [at for stop in self.sampling.stop if (at := text.find(stop)) >= 0]
        self.text = text[: min(ends)] if ends else text
