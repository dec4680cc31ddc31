"""The chance that a row ends with its next token, from rows that have ended."""

from __future__ import annotations

import pytest

from zeroinf.generation.lifetimes import Lifetimes


def lifetimes(*ended: tuple[int, bool]) -> Lifetimes:
    found = Lifetimes()
    for tokens, was_cut in ended:
        found.note(tokens, was_cut=was_cut)
    return found


def test_a_length_that_no_row_has_had_says_nothing() -> None:
    assert lifetimes().chance(3) == lifetimes((1, False), (2, True)).chance(3) == 0.5


def test_rows_that_ended_shorter_do_not_count_and_rows_that_were_cut_ended_nowhere() -> None:
    found = lifetimes(*[(1, False)] * 50, *[(8, False)] * 30, *[(8, True)] * 8, *[(20, False)] * 60)
    assert found.chance(8) == pytest.approx(31 / 100)
    assert found.chance(7) == pytest.approx(1 / 100)


def test_many_rows_that_may_end_hardly_end_together_unless_all_have_always_ended_there() -> None:
    assert not Lifetimes().all_end([4] * 8, 0.02)
    assert Lifetimes().all_end([4] * 2, 0.02)
    together = lifetimes(*[(4, False)] * 400)
    assert together.all_end([4] * 400, 0.02)
    assert not together.all_end([3] * 2, 0.02)
    assert not together.all_end([*[4] * 399, 3], 0.02)


def test_of_very_many_rows_a_part_is_remembered() -> None:
    found = lifetimes(*[(number % 100, False) for number in range(20_000)])
    assert found.chance(50) == pytest.approx(1 / 50, rel=0.2)
