"""Follows answers token by token, and says which tokens may come next, as a bit for each token of the vocabulary.

Input: the bytes of a tokenizer's tokens and the format of each answer. Output: packed masks. It knows nothing of rows,
tensors or devices, and no method needs more than the tokens so far, so an answer can be taken up anywhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from functools import cached_property, lru_cache
from importlib.util import find_spec
from threading import Lock, Thread
from typing import TYPE_CHECKING

from zeroinf.structured.answer_format import AnswerFormat

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLTokenizer

WORD_BITS = 64
_MOST_THREADS = 8
_SPECIAL = b"\xff"  # llguidance's mark of a token that is no text
_NO_TEXT = b""


class Vocabulary:
    """The tokens of a model as grammars see them. To read them takes up to a second: `read_ahead` does it in a thread,
    else the first use does."""

    def __init__(
        self, piece: Callable[[int], bytes | None], size: int, special: Collection[int], ends: Collection[int]
    ) -> None:
        """`piece` gives the bytes that a token adds to a text, None for one that has none; there are `size` tokens.

        No text holds those that are `special`; `ends` are those that end a sequence.
        """
        self._piece, self._size = piece, size
        self._ends = sorted(token for token in ends if token < size)
        self._special = frozenset(special) | frozenset(self._ends)
        self.words = -(-size // WORD_BITS)
        """Words of 64 bits in a mask."""
        self._read: LLTokenizer | None = None
        self._reading = Lock()

    def read_ahead(self) -> Thread | None:
        """Begin to read the vocabulary in a thread, if llguidance is there. A first use waits for it.

        The end of the process does so, too: llguidance is not made for a thread that ends within it.
        """
        if not self._ends or find_spec("llguidance") is None:
            return None
        thread = Thread(target=lambda: self.tokenizer, name="zeroinf-vocabulary")
        thread.start()
        return thread

    @property
    def tokenizer(self) -> LLTokenizer:
        """llguidance's view of the vocabulary."""
        with self._reading:
            if self._read is None:
                self._read = self._tokenizer()
            return self._read

    def _tokenizer(self) -> LLTokenizer:
        from llguidance import LLTokenizer, TokenizerWrapper

        pieces = [self._bytes_of(token) for token in range(self._size)]
        pieces += [_NO_TEXT] * (self.words * WORD_BITS - self._size)
        return LLTokenizer(TokenizerWrapper(_Pieces(pieces, self._ends[0])), eos_token=self._ends)

    def _bytes_of(self, token: int) -> bytes:
        if token in self._special:
            return _SPECIAL + str(token).encode()
        return self._piece(token) or _NO_TEXT

    @cached_property
    def _executor(self) -> LLExecutor:
        from llguidance import LLExecutor

        return LLExecutor(max(1, min(_MOST_THREADS, os.cpu_count() or 1)))

    @cached_property
    def _compiled(self) -> Callable[[AnswerFormat], LLMatcher]:
        from llguidance import LLMatcher

        return lru_cache(maxsize=256)(lambda asked: LLMatcher(self.tokenizer, asked.grammar(), log_level=0))

    def begin(self, asked: AnswerFormat) -> LLMatcher:
        """llguidance's matcher at the beginning of an answer. Raises ValueError where no answer could end."""
        if not self._ends:
            raise ValueError("the model has no end-of-sequence token")
        return self._compiled(asked).deep_copy()

    def take(self, answers: Sequence[tuple[AnswerState, int]]) -> None:
        """Let each of `answers` go on with its next token."""
        going_on = [(answer, token) for answer, token in answers if not answer.problem]
        if going_on:
            self._executor.consume_token_par([(answer.matcher, token) for answer, token in going_on])
        for answer, _ in going_on:
            answer.took()

    def fill(self, answers: Sequence[tuple[AnswerState, int]], address: int, rows: int) -> None:
        """Write the mask of each of `answers` into its row of `rows` at `address`, each of `words` words."""
        found = [(answer.matcher, row) for answer, row in answers]
        if found:
            self._executor.unsafe_compute_mask_ptr(found, address, self.words * WORD_BITS // 8, rows)


class _Pieces:
    """A tokenizer in the form that llguidance takes. It is asked to tokenize only where forced text is looked up, which
    masks do not need."""

    bos_token_id = None
    special_token_ids: Sequence[int] = ()

    def __init__(self, tokens: Sequence[bytes], end: int) -> None:
        self.tokens, self.eos_token_id = tokens, end

    def __call__(self, text: bytes) -> list[int]:
        return []


class AnswerState:
    """One answer as it grows."""

    def __init__(self, vocabulary: Vocabulary, asked: AnswerFormat) -> None:
        self.vocabulary, self._asked = vocabulary, asked
        self._matcher: LLMatcher | None = None
        self._followed = 0
        self.is_complete = False
        """Whether it has the format, and nothing can follow."""
        self.problem = ""
        """Why it cannot go on, if it cannot."""

    @property
    def matcher(self) -> LLMatcher:
        """llguidance's, where the answer is now."""
        if self._matcher is None:
            self._matcher = self.vocabulary.begin(self._asked)
        return self._matcher

    def follow(self, tokens: Sequence[int]) -> None:
        """Go on to the end of `tokens`, all those of the answer so far."""
        try:
            self.matcher.consume_tokens(list(tokens[self._followed :]))
        except ValueError as error:
            self.problem = str(error)
            return
        self._followed = len(tokens)
        self._judge()

    def took(self) -> None:
        """The matcher has gone on with the next token."""
        self._followed += 1
        self._judge()

    def _judge(self) -> None:
        if self.matcher.is_stopped():  # failed ones are, too
            self.check()
            self.is_complete = not self.problem and self.matcher.is_accepting()

    def check(self) -> None:
        """Notice where the grammar has failed, such as by growing beyond llguidance's limits."""
        if self.matcher.is_error():
            why = self.matcher.get_error().splitlines()[0]
            if why.startswith("NoExtension"):
                why = "none of the model's tokens goes on with it"
            self.problem = f"the format of the answer cannot be followed: {why}"
