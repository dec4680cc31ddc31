"""Why a row ends, and the text that it ends with."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from zeroinf.generation.row import NO_TOKEN, Row, Sampling
from zeroinf.structured.answer_format import AnswerFormat

EOS = 0
ENDS = frozenset({EOS})


def decode(tokens: Sequence[int]) -> str:
    """Bytes as tokens; 0 is the end of sequence and shows nothing."""
    return bytes(token for token in tokens if token != EOS).decode(errors="replace")


def piece(token: int) -> bytes:
    return bytes([token]) if token != EOS else b"<end>"


def row(prompt: str = "!", **sampling: object) -> Row:
    return Row(
        index=0,
        prompt=tuple(prompt.encode()),
        sampling=Sampling(**{"max_new_tokens": 100, **sampling}),  # type: ignore[arg-type]
        decode=decode,
        piece=piece,
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
    said = "some early and late text"
    two = Row(
        index=0,
        prompt=(1,),
        sampling=Sampling(max_new_tokens=9, stop=("late", "early")),
        decode=lambda tokens: said * len(tokens),
        piece=lambda token: said.encode(),
    )
    two.accept(7, ENDS)
    assert (two.finish_reason, two.text) == ("stop", "some ")


def test_a_stop_string_in_the_prompt_or_in_part_ends_nothing() -> None:
    assert feed(row(stop=("END",), max_new_tokens=9), "EN DENDE").text == "EN D"
    assert feed(row(stop=("END",), max_new_tokens=5), "EN DE").finish_reason == "length"


@pytest.mark.parametrize("stop", ["ß", "日本", "🙂!"])
def test_a_stop_string_of_many_bytes_is_found_after_a_long_text(stop: str) -> None:
    ended = feed(row(stop=(stop,), max_new_tokens=500), "é" * 60 + stop + "more")
    assert (ended.finish_reason, ended.text) == ("stop", "é" * 60)


@pytest.mark.parametrize(
    ("stop", "said", "text"),
    [
        ("<end>", "", ""),
        ("<end>", "abc", "abc"),
        ("c<end>", "abc", "ab"),
        ("end", "abc", "abc"),
        ("é<end>", "aéé", "aé"),
    ],
)
def test_a_stop_string_may_hold_a_special_token_of_which_no_text_is_shown(stop: str, said: str, text: str) -> None:
    ended = feed(row(stop=(stop,), ignore_eos=True), said, then=[EOS, *b"more"])
    assert (ended.finish_reason, ended.text, ended.generated) == ("stop", text, [*said.encode(), EOS])


def test_what_only_meets_because_a_special_token_is_not_shown_is_no_stop_string() -> None:
    ended = feed(row(stop=("ab",), ignore_eos=True), "x", then=[*b"a", EOS, *b"b, ab"])
    assert (ended.finish_reason, ended.text) == ("stop", "xab, ")


def test_a_stop_string_that_begins_in_the_prompt_ends_the_row_as_in_transformers() -> None:
    ended = feed(row("so the EN", stop=("END",)), "Dmore")
    assert (ended.finish_reason, ended.text, len(ended.generated)) == ("stop", "", 1)


def test_stop_strings_of_the_model_end_rows_that_do_not_ignore_its_end() -> None:
    for ignores, end in ((False, ("stop", "a")), (True, ("length", "a.b"))):
        one = row(max_new_tokens=3, ignore_eos=ignores)
        for token in b"a.b":
            if not one.finished:
                one.accept(token, ENDS, (".",))
        assert (one.finish_reason, one.text) == end


def test_a_token_without_text_parts_what_is_before_from_what_is_behind() -> None:
    parted = Row(
        index=0,
        prompt=(),
        sampling=Sampling(max_new_tokens=4, stop=("ab",)),
        decode=decode,
        piece=lambda token: bytes([token]) if token < 200 else None,
    )
    for token in (*b"a", 200, *b"b", 201):
        parted.accept(token, ENDS)
    assert parted.finish_reason == "length"


def test_the_cost_of_a_token_does_not_grow_with_the_text() -> None:
    asked = 0

    def counted(token: int) -> bytes:
        nonlocal asked
        asked += 1
        return bytes([token])

    def no_text(tokens: Sequence[int]) -> str:
        raise AssertionError("decoded before its end")

    long = Row(
        index=0, prompt=(1,), sampling=Sampling(max_new_tokens=2000, stop=("end",)), decode=no_text, piece=counted
    )
    for _ in range(1000):
        long.accept(ord("a"), ENDS)
    assert asked <= 3 * 1000


def test_stop_strings_without_the_text_of_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="stop"):
        Row(index=0, prompt=(1,), sampling=Sampling(max_new_tokens=1, stop=("x",)), decode=decode)


def test_where_there_is_nothing_to_choose_by_a_row_ends_in_error_without_text() -> None:
    ended = feed(row(), "abc", then=[NO_TOKEN])
    assert (ended.finish_reason, ended.text, len(ended.generated)) == ("error", "", 3)


def test_stop_tokens_end_a_row_that_ignores_its_end_and_leave_no_text() -> None:
    ended = feed(row(stop_token_ids=(ord("c"),), ignore_eos=True), "abcdef")
    assert (ended.finish_reason, ended.text, len(ended.generated)) == ("stop", "ab", 3)


def test_what_ended_a_row_is_in_its_text_where_that_is_asked_for() -> None:
    assert feed(row(stop=("cd",), include_stop=True), "abcdef").text == "abcd"
    assert feed(row(stop_token_ids=(ord("c"),), include_stop=True), "abcdef").text == "abc"


def test_nothing_ends_a_row_before_its_least_length() -> None:
    ended = feed(row(stop=("b",), stop_token_ids=(ord("c"),), min_tokens=5), "abcabcabc")
    assert (ended.finish_reason, ended.text) == ("stop", "abca")
    ended = feed(row(min_tokens=3), "a", then=[EOS, *b"bb", EOS])
    assert (ended.finish_reason, ended.text, len(ended.generated)) == ("stop", "abb", 5)


def test_an_end_of_sequence_is_not_in_a_text_that_shows_special_tokens() -> None:
    ended = Row(index=0, prompt=(1,), sampling=Sampling(max_new_tokens=9, skip_special_tokens=False), decode=str)
    for token in (5, EOS):
        ended.accept(token, ENDS)
    assert ended.text == "[5]"


def test_a_format_alters_scores_and_weighs_no_tokens() -> None:
    formatted = Sampling(max_new_tokens=1, answer_format=AnswerFormat("regex", "a"))
    assert (formatted.alters_scores, formatted.weighs_tokens) == (True, False)
    for weighing in ({"logit_bias": ((3, 1.0),)}, {"min_tokens": 1}, {"repetition_penalty": 1.1}):
        asked = Sampling(max_new_tokens=1, **weighing)  # type: ignore[arg-type]
        assert asked.alters_scores and asked.weighs_tokens
