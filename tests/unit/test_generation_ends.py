"""The tokens that may end a row: none that does is missing, and most others are passed over."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from zeroinf.generation.ends import Ends
from zeroinf.generation.row import NO_TOKEN, Row, Sampling

PIECES = (b"a", b"b", b"ab", b"ba", b"", b"aab", None, b"c")
"""By token; None: a token without text."""
EOS = 7


def row_of(sampling: Sampling) -> Row:
    def decode(tokens: object) -> str:
        return b"".join(PIECES[token] or b"" for token in tokens).decode()  # type: ignore[attr-defined]

    return Row(index=0, prompt=[0, 1], sampling=sampling, decode=decode, piece=lambda token: PIECES[token])


@given(
    st.lists(st.integers(0, len(PIECES) - 1), max_size=12),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=2).map(tuple),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=1).map(tuple),
    st.sets(st.integers(0, len(PIECES) - 1), max_size=1).map(tuple),
    st.booleans(),
)
def test_a_token_that_ends_a_row_is_among_those_that_may(
    tokens: list[int], own: tuple[str, ...], stops: tuple[str, ...], ids: tuple[int, ...], ignore_eos: bool
) -> None:
    row = row_of(Sampling(max_new_tokens=20, stop=own, stop_token_ids=ids, ignore_eos=ignore_eos))
    ends = Ends(frozenset({EOS}), stops).of(row)
    for token in tokens:
        row.accept(token, frozenset({EOS}), stops)
        if row.finished:
            assert token in ends
            break
    assert NO_TOKEN in ends


def test_other_tokens_are_passed_over_and_kinds_of_rows_without_end_are_not_kept() -> None:
    ends = Ends(frozenset({EOS}), ())
    assert [token for token in range(8) if token in ends.of(row_of(Sampling(max_new_tokens=9)))] == [EOS]
    stop_b = ends.of(row_of(Sampling(max_new_tokens=9, stop=("bb",), ignore_eos=True)))
    assert [token for token in range(8) if token in stop_b] == [1, 3]
    assert ends.of(row_of(Sampling(max_new_tokens=5, stop=("bb",), ignore_eos=True))) is stop_b
    for number in range(300):
        ends.of(row_of(Sampling(max_new_tokens=9, stop=(f"stop {number}",))))
    assert len(ends._known) < 300
