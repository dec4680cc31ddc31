"""Determines the tokens that may end a row, so that the generation loop examines only those and counts all others."""

from __future__ import annotations

from collections.abc import Container

from zeroinf.generation.row import NO_TOKEN, Piece, Row

_MOST_KINDS = 256
"""Kinds of rows that are kept at once; a server may be given stop strings without end."""


class Ends:
    """The tokens that may end a row, made once for all rows that end alike. Rows have the same pieces of tokens."""

    def __init__(self, eos_tokens: frozenset[int], stops: tuple[str, ...]) -> None:
        """`eos_tokens` and `stops`, strings, end every row that does not ignore them."""
        self._eos_tokens, self._stops = eos_tokens, stops
        self._known: dict[tuple[tuple[str, ...], tuple[int, ...], bool], Container[int]] = {}

    def of(self, row: Row) -> Container[int]:
        """The tokens after which `row` may have ended, NO_TOKEN among them."""
        if row.answer is not None:
            return _EVERY
        how = row.sampling
        kind = how.stop, how.stop_token_ids, how.ignore_eos
        if kind not in self._known:
            if len(self._known) == _MOST_KINDS:
                self._known.clear()
            tokens = frozenset({NO_TOKEN, *how.stop_token_ids, *(() if how.ignore_eos else self._eos_tokens)})
            stops = how.stop if how.ignore_eos else how.stop + self._stops
            assert row.piece is not None or not stops
            self._known[kind] = _OrInStops(tokens, stops, row.piece) if stops and row.piece is not None else tokens
        return self._known[kind]


class _Every:
    """All tokens."""

    def __contains__(self, token: object) -> bool:
        return True


_EVERY = _Every()
"""Any token may complete an answer that has a format."""


class _OrInStops:
    """`tokens`, and every token in whose piece one of `stops` may end."""

    def __init__(self, tokens: frozenset[int], stops: tuple[str, ...], piece: Piece) -> None:
        self._stops, self._piece = [stop.encode(errors="surrogatepass") for stop in stops], piece
        self._known = dict.fromkeys(tokens, True)

    def __contains__(self, token: object) -> bool:
        assert isinstance(token, int)
        found = self._known.get(token)
        if found is None:
            piece = self._piece(token)
            found = self._known[token] = bool(piece) and any(_may_end(stop, piece) for stop in self._stops)  # type: ignore[arg-type]
        return found


def _may_end(stop: bytes, piece: bytes) -> bool:
    """Whether `stop` can end in `piece`, behind some other text: it lies in it, or an end of it begins it."""
    return stop in piece or any(piece.startswith(stop[at:]) for at in range(1, len(stop)))
