"""The bytes that each token of a tokenizer adds to a text, for matching stop strings as transformers does."""

from __future__ import annotations

from typing import Any

from zeroinf.compat.stop_strings import token_bytes

_BEFORE = "abcdef"
"""Text before a token, so that it is decoded as in the middle of a text; transformers takes the same."""


class TokenBytes:
    """Maps a token id to its bytes, special tokens included; None for an id that the tokenizer does not have.

    The text of several tokens is their bytes joined: a token may hold a part of a character only. The rules are those
    of transformers' StopStringCriteria, whose functions are used: it reads the whole vocabulary, this class the tokens
    that it is asked for.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._bytes_of = token_bytes(tokenizer)
        before = tokenizer(_BEFORE, add_special_tokens=False)["input_ids"]
        self._before = tokenizer.convert_ids_to_tokens(before)
        self._known: dict[int, bytes | None] = {}

    def __call__(self, token: int) -> bytes | None:
        if token not in self._known:
            self._known[token] = self._piece(token)
        return self._known[token]

    def _piece(self, token: int) -> bytes | None:
        try:
            name = self._tokenizer.convert_ids_to_tokens(token)
        except (IndexError, KeyError, OverflowError):
            return None
        if name is None:
            return None
        known = self._bytes_of(name)
        if known is not None:
            return known
        text = self._tokenizer.convert_tokens_to_string([*self._before, name])
        at = text.find(_BEFORE)
        alone = self._tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(alone if at < 0 else text[at + len(_BEFORE) :]).encode()
