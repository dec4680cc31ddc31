"""Emits the text of a row while it grows: only text that later tokens cannot change or take back."""

from __future__ import annotations

from collections.abc import Sequence

from zeroinf.generation.row import Decode

_PART_OF_A_CHARACTER = "\ufffd"
# Tokenizers make a token's text depend on a few before it: a space at the start of a word, a joined character.
_LEAD_TOKENS = 6


class TextStream:
    """Tells a row's text piece by piece. All pieces together are the text with which the row ends.

    Held back are characters of which a part is still to come, and the beginning of what may become a stop string.
    """

    def __init__(self, decode: Decode, stop: Sequence[str]) -> None:
        self._decode, self._stop = decode, stop
        self._begin = self._read = 0
        """Tokens before the first that is decoded again, and those whose text is known."""
        self._held = ""
        """Known, and not told: it may be a part of a stop string."""
        self._told = ""

    def take(self, tokens: Sequence[int]) -> str:
        """The text that can be told now that a row has generated `tokens`, and was not told before."""
        before = self._decode(tokens[self._begin : self._read])
        now = self._decode(tokens[self._begin :])
        if now.endswith(_PART_OF_A_CHARACTER) or not now.startswith(before):
            return ""
        self._read = len(tokens)
        self._begin = max(self._begin, self._read - _LEAD_TOKENS)
        known = self._held + now[len(before) :]
        kept = max((_overlap(known, stop) for stop in self._stop), default=0)
        self._held = known[len(known) - kept :]
        return self._tell(known[: len(known) - kept])

    def finish(self, text: str) -> str:
        """The rest of `text`, with which the row has ended."""
        return self._tell(text.removeprefix(self._told))

    def _tell(self, piece: str) -> str:
        self._told += piece
        return piece


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` with which `stop` begins."""
    return next((size for size in range(min(len(text), len(stop)), 0, -1) if text.endswith(stop[:size])), 0)
