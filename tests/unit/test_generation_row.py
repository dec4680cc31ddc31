"""Why a row ends, and the text that it ends with."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from zeroinf.generation.row import NO_TOKEN, Row, Sampling

EOS = 0
ENDS = frozenset({EOS})


def decode(tokens: Sequence[int]) -> str:
    """Bytes as tokens; 0 is the end of sequence and shows nothing."""
    return bytes(token for token in tokens if token != EOS).decode(errors="replace")


def row(**sampling: object) -> Row:
    return Row(
        index=0,
        prompt=(1,),
        sampling=Sampling(**{"max_new_tokens": 100, **sampling}),  # type: ignore[arg-type]
        decode=decode,
    )


def feed(row: Row, text: str, *, then: Sequence[int] = ()) -> Row:
    """Give the row a text's bytes one by one until it ends."""
    for token in (*text.encode(), *then):
        if row.finished:
            break
        row.accept(token, ENDS)
    return row


def test_a_row_ends_at_its_own_length() -> None:
    ended = feed(row(max_new_tokens=5), "abcdefgh")
    assert (ended.finish_reason, ended.text, len(ended.generated)) == ("length", "abcde", 5)


def test_end_of_sequence_counts_as_generated_and_leaves_no_text() -> None:
    ended = feed(row(), "abc", then=[EOS])
    assert (ended.finish_reason, ended.text, len(ended.generated)) == ("stop", "abc", 4)


def test_end_of_sequence_as_the_last_token_allowed_is_a_stop() -> None:
    assert feed(row(max_new_tokens=4), "abc", then=[EOS]).finish_reason == "stop"


def test_ignore_eos_goes_on_to_the_full_length() -> None:
    ended = feed(row(max_new_tokens=6, ignore_eos=True), "abc", then=[EOS, *b"de"])
    assert (ended.finish_reason, ended.text, len(ended.generated)) == ("length", "abcde", 6)


def test_a_stop_string_over_several_tokens_ends_the_row_and_is_left_out() -> None:
    ended = feed(row(stop=("END",)), "so the END comes")
    assert (ended.finish_reason, ended.text) == ("stop", "so the ")
    assert decode(ended.generated) == "so the END"


def test_the_text_is_cut_at_the_first_of_several_stop_strings() -> None:
    """One token may bring two of them at once."""
    two = Row(index=0, prompt=(1,), sampling=Sampling(max_new_tokens=9, stop=("late", "early")), decode=lambda t: t[0])
    two.accept("some early and late text", ENDS)  # type: ignore[arg-type]
    assert (two.finish_reason, two.text) == ("stop", "some ")


def test_a_stop_string_in_the_prompt_or_in_part_ends_nothing() -> None:
    assert feed(row(stop=("END",), max_new_tokens=9), "EN DENDE").text == "EN D"
    assert feed(row(stop=("END",), max_new_tokens=5), "EN DE").finish_reason == "length"


@pytest.mark.parametrize("stop", ["ß", "日本", "🙂!"])
def test_a_stop_string_of_many_bytes_is_found_after_a_long_text(stop: str) -> None:
    ended = feed(row(stop=(stop,), max_new_tokens=500), "é" * 60 + stop + "more")
    assert (ended.finish_reason, ended.text) == ("stop", "é" * 60)


def test_a_stop_string_is_found_even_where_its_tokens_show_nothing_by_themselves() -> None:
    ended = feed(row(stop=("ab",), ignore_eos=True), "x", then=[*b"a", *[EOS] * 5, *b"b"])
    assert (ended.finish_reason, ended.text) == ("stop", "x")


def test_where_there_is_nothing_to_choose_by_a_row_ends_in_error_without_text() -> None:
    ended = feed(row(), "abc", then=[NO_TOKEN])
    assert (ended.finish_reason, ended.text, len(ended.generated)) == ("error", "", 3)
