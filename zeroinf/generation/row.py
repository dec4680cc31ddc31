"""The state of one sequence: its prompt, its sampling settings, the tokens generated so far, and why it ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from typing import Literal

from zeroinf.structured.answer_format import AnswerFormat
from zeroinf.structured.matcher import AnswerState

Decode = Callable[[Sequence[int]], str]
Piece = Callable[[int], bytes | None]
FinishReason = Literal["stop", "length", "error", "cancelled"]

NO_TOKEN = -1
"""Chosen where the model's scores are not numbers, and there is nothing to choose by."""
NO_TOKEN_ALLOWED = -2
"""Chosen where the format of the answer allows no token, or none that has a score."""

MOST_LOGPROBS = 20
"""As many likely tokens as OpenAI's API tells."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """Sampling settings of one sequence: how the next token is chosen and when the sequence ends."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    """Tell each token's log-probability, and those of so many of the likeliest; None: tell none."""
    presence_penalty: float = 0.0
    """Taken off the score of each token that has been generated."""
    frequency_penalty: float = 0.0
    """Taken off as often as it has been generated."""
    repetition_penalty: float = 1.0
    """Divides the score of each token of prompt and completion if it is above 0, and multiplies it if below."""
    min_p: float = 0.0
    """Tokens less likely than this share of the likeliest are not drawn."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Tokens and what is added to their scores."""
    min_tokens: int = 0
    """Nothing but `max_new_tokens` ends the row before it has so many tokens."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the row, like those of the end of a sequence, also where it ignores these."""
    include_stop: bool = False
    """The text ends with the stop string, or the token, that ended the row."""
    skip_special_tokens: bool = True
    """The text has no special tokens."""
    stop_spans_prompt: bool = True
    """A stop string may begin in the prompt, as in transformers."""
    answer_format: AnswerFormat | None = None
    """What the completion must look like: where it says so the row ends, and nowhere else."""

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
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2.0 <= getattr(self, name) <= 2.0:
                raise ValueError(f"{name} must lie between -2 and 2, not {getattr(self, name)}")
        if not 0.0 < self.repetition_penalty <= 100.0:
            raise ValueError(f"repetition_penalty must lie above 0 and at most at 100, not {self.repetition_penalty}")
        if not 0.0 <= self.min_p <= 1.0:
            raise ValueError(f"min_p must lie between 0 and 1, not {self.min_p}")
        if not 0 <= self.min_tokens <= self.max_new_tokens:
            raise ValueError(
                f"min_tokens must lie between 0 and max_new_tokens ({self.max_new_tokens}), not {self.min_tokens}"
            )
        if any(not -100.0 <= bias <= 100.0 for _, bias in self.logit_bias):
            raise ValueError("logit_bias must lie between -100 and 100")
        if any(token < 0 for token in self.stop_token_ids):
            raise ValueError("stop_token_ids must not be negative")
        if self.answer_format is not None:
            ends = {name: getattr(self, name) for name in ("stop", "stop_token_ids", "ignore_eos", "min_tokens")}
            if named := [name for name, value in ends.items() if value]:
                raise ValueError(f"{named[0]} with response_format: the format says where the answer ends")

    @property
    def alters_scores(self) -> bool:
        """Whether the model's scores are altered before a token is chosen by them."""
        return self.weighs_tokens or self.answer_format is not None

    @property
    def weighs_tokens(self) -> bool:
        """Whether something other than a format does it: biases, a least length, or penalties."""
        return bool(self.logit_bias) or self.min_tokens > 0 or self.penalizes

    @property
    def penalizes(self) -> bool:
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True)
class Likelihood:
    """The log-probability of a generated token, and of the likeliest alternatives."""

    logprob: float
    top: tuple[tuple[int, float], ...]
    """The likeliest tokens with their log-probabilities, the likeliest first."""


@dataclass(slots=True, eq=False)
class Row:
    """A request's tokens: `prompt` as given, `generated` as it grows (an end-of-sequence token included).

    Where an encoder reads what was given, that is `source`, and `prompt` is what the decoder begins with. `decode`
    gives the text of tokens, special ones left out; `piece` the bytes that one token adds to a text, special ones
    included, and None for a token that has no text. Stop strings are searched for in pieces. Raises ValueError where
    `sampling` has stop strings and there is no `piece`.
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
    piece: Piece | None = None
    urgent: bool = False
    """Somebody waits for it: it enters before rows of which that is not so."""
    answer: AnswerState | None = None
    """Where the answer is in its format, if it has one."""
    problem: str = ""
    """Why the row ended in error, where the scores were numbers."""

    def __post_init__(self) -> None:
        if self.sampling.stop and self.piece is None:
            raise ValueError("stop strings need the text of single tokens")

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def draw(self, number: int) -> float:
        """The random number for this row's token `number`, uniform in [0, 1): the same however often it is asked."""
        digest = blake2b(f"{self.sampling.seed}/{self.index}/{number}".encode(), digest_size=8).digest()
        return (int.from_bytes(digest) >> 11) / 2**53

    def accept(self, token: int, eos_tokens: frozenset[int], stops: tuple[str, ...] = ()) -> None:
        """Take the next token; sets `finish_reason` and `text` when the row ends with it.

        `eos_tokens` and `stops` (strings) end every row but those that ignore them (`ignore_eos`), the row's own stop
        strings end it always. An answer with a format ends where that is complete, or with one of `eos_tokens`. With
        NO_TOKEN or NO_TOKEN_ALLOWED it ends in error, and its tokens never become text.
        """
        if token in (NO_TOKEN, NO_TOKEN_ALLOWED):
            self._fail(token)
            return
        self.generated.append(token)
        sampling = self.sampling
        if self.answer is not None:
            if self.answer.is_complete or token in eos_tokens:
                self.finish_reason, self.text = "stop", self._text_to_end(token)
                return
            stops = ()
            eos_tokens = frozenset()
        if len(self.generated) >= sampling.min_tokens:
            stop = self._find_stop(sampling.stop if sampling.ignore_eos else sampling.stop + stops)
            if stop is not None:
                self.finish_reason, self.text = "stop", self._text_before(*stop[:2])
                self.text += stop[2] if sampling.include_stop else ""
                return
            if token in sampling.stop_token_ids or (token in eos_tokens and not sampling.ignore_eos):
                self.finish_reason, self.text = "stop", self._text_to_end(token)
                return
        if len(self.generated) == sampling.max_new_tokens:
            self.finish_reason, self.text = "length", self.decode(self.generated)

    def _fail(self, token: int) -> None:
        self.finish_reason = "error"
        if token == NO_TOKEN_ALLOWED and self.answer is not None:
            self.problem = self.answer.problem or "no token that the format of the answer allows can be chosen"

    def cancel(self) -> None:
        """End the row where it is: nobody wants more of it."""
        self.finish_reason, self.text = "cancelled", self.decode(self.generated)

    def _text_to_end(self, token: int) -> str:
        """The text of a row that `token` has ended; that one is left out, unless it is to be seen."""
        leaves_out = token in self.sampling.stop_token_ids or not self.sampling.skip_special_tokens
        return self.decode(self.generated[:-1] if leaves_out and not self.sampling.include_stop else self.generated)

    def _find_stop(self, stops: tuple[str, ...]) -> tuple[int, int, str] | None:
        """The beginning of the first of `stops` that ends in the last token: a generated token's number, and a byte in
        its piece; number -1 where that is in the prompt. And which of `stops` it is.

        As in transformers' StopStringCriteria, as many tokens are looked at as the longest stop string has bytes.
        """
        if not stops:
            return None
        assert self.piece is not None
        encoded = _encoded(stops)
        reach = max(map(len, encoded))
        tokens = self.generated[-reach:]
        if len(tokens) < reach and self.sampling.stop_spans_prompt:
            tokens = [*self.prompt[len(tokens) - reach :], *tokens]
        pieces: list[bytes] = []
        for token in reversed(tokens):
            if (piece := self.piece(token)) is None:
                break
            pieces.append(piece)
        if not pieces:
            return None
        text, last = b"".join(reversed(pieces)), len(pieces[0])
        places = (text.find(stop, max(0, len(text) - last - len(stop) + 1)) for stop in encoded)
        found = [(at, which) for which, at in enumerate(places) if at >= 0]
        if not found:
            return None
        at, which = min(found)
        number = len(self.generated) - len(pieces)
        while at >= len(piece := pieces[len(self.generated) - number - 1]):
            number, at = number + 1, at - len(piece)
        return (number, at, stops[which]) if number >= 0 else (-1, 0, stops[which])

    def _text_before(self, number: int, at: int) -> str:
        """The text of what precedes byte `at` in the piece of the generated token `number`."""
        before = self.decode(self.generated[: max(0, number)])
        if at == 0 or not self.decode(self.generated[number : number + 1]):  # nothing is shown of special tokens
            return before
        assert self.piece is not None
        piece = self.piece(self.generated[number]) or b""
        # The bytes before may continue a character of earlier tokens: only the decoder can tell their text.
        text, rest = self.decode(self.generated[: number + 1]), piece[at:].decode(errors="replace")
        return text.removesuffix(rest) if text.endswith(rest) else before + piece[:at].decode(errors="replace")


@lru_cache
def _encoded(stops: tuple[str, ...]) -> tuple[bytes, ...]:
    return tuple(stop.encode(errors="surrogatepass") for stop in stops)
