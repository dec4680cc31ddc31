"""The scheduler alone: nothing is lost, nobody waits for ever, and no pass holds more than it may."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from generating import rows_of
from hypothesis import given, settings
from hypothesis import strategies as st

from zeroinf.generation.groups import Group
from zeroinf.generation.pass_limits import Limits
from zeroinf.generation.scheduler import Scheduler

PAGE = 16


def pages_of(tokens: int) -> int:
    return -(-tokens // PAGE)


def limits(**given: Any) -> Limits:
    return Limits(**{"rows": 4, "pages": 40, "micro_batch_rows": 4, "prefill_tokens": 200, **given})


def finish(scheduler: Scheduler, passes: int = 10_000) -> list[list[Group]]:
    """Make passes until no row is left; returns them."""
    made = []
    while True:
        scheduler.admit()
        groups = scheduler.next_pass()
        if not groups:
            return made
        made.append(groups)
        for group in groups:
            scheduler.advance(group)
        assert len(made) < passes, "rows wait for ever"


jobs = st.lists(st.tuples(st.integers(1, 120), st.integers(1, 40)), min_size=1, max_size=30)
shapes = st.builds(
    limits,
    rows=st.integers(1, 8),
    pages=st.integers(10, 60),
    micro_batch_rows=st.integers(1, 5),
    prefill_tokens=st.integers(1, 300),
    breaks_at=st.none() | st.integers(2, 100),
    static=st.booleans(),
    entering_rows=st.integers(1, 5),
)


@settings(deadline=None)
@given(jobs, shapes)
def test_every_row_is_computed_in_order_to_its_end_within_the_limits(
    jobs: list[tuple[int, int]], shape: Limits
) -> None:
    rows = rows_of([[1] * prompt for prompt, _ in jobs], [new for _, new in jobs])
    scheduler = Scheduler(shape, pages_of)
    scheduler.add(rows)
    computed, chosen = dict.fromkeys(range(len(rows)), 0), dict.fromkeys(range(len(rows)), 0)
    for groups in finish(scheduler):
        seats = [seat for group in groups for seat in group.seats]
        assert len({seat.row.index for seat in seats}) == len(seats) <= shape.rows
        assert len({seat.number for seat in seats}) == len(seats)
        assert sum(pages_of(seat.total) for seat in seats) <= shape.pages
        assert all(len(group.seats) <= shape.micro_batch_rows for group in groups)
        prompts = [group for group in groups if group.width > 1]
        columns = sum(len(group.seats) * group.width for group in prompts)
        assert columns <= shape.prefill_tokens or (len(seats) and len(prompts[0].seats) == len(prompts) == 1)
        for group in groups:
            for seat, start, count, chooses in zip(group.seats, group.starts, group.counts, group.chooses, strict=True):
                row = seat.row.index
                broken = shape.breaks_at is not None and start == 0
                assert start == (0 if broken else computed[row])
                computed[row] = start + count
                chosen[row] += chooses
                assert chooses == (computed[row] == len(seat.row.prompt) + chosen[row] - 1 + (not chooses))
    assert chosen == {row.index: row.sampling.max_new_tokens for row in rows}
    assert scheduler.seats == []
    assert scheduler._free_pages == shape.pages


@settings(deadline=None)
@given(jobs, shapes, st.integers(1, 150))
def test_packed_passes_hold_as_many_tokens_as_they_may_side_by_side(
    jobs: list[tuple[int, int]], shape: Limits, forward_tokens: int
) -> None:
    shape = replace(shape, forward_tokens=forward_tokens)
    rows = rows_of([[1] * prompt for prompt, _ in jobs], [new for _, new in jobs])
    scheduler = Scheduler(shape, pages_of)
    scheduler.add(rows)
    computed, chosen = dict.fromkeys(range(len(rows)), 0), dict.fromkeys(range(len(rows)), 0)
    for groups in finish(scheduler):
        parts = [part for group in groups for part in zip(group.seats, group.starts, group.counts, strict=True)]
        prompts = sum(count for _, start, count in parts if count > 1)
        is_whole = shape.breaks_at is not None
        assert prompts <= shape.prefill_tokens or (is_whole and len([1 for *_, count in parts if count > 1]) == 1)
        assert len({seat for seat, *_ in parts}) <= shape.rows
        for group in groups:
            assert group.is_packed
            assert sum(group.counts) <= forward_tokens or (is_whole and max(group.counts) > 1)
            assert len(group.seats) <= shape.micro_batch_rows
            for seat, start, count, chooses in zip(group.seats, group.starts, group.counts, group.chooses, strict=True):
                row = seat.row.index
                assert start == computed[row] or (is_whole and start == 0)
                computed[row] = start + count
                chosen[row] += chooses
    assert chosen == {row.index: row.sampling.max_new_tokens for row in rows}
    assert scheduler.seats == []
    assert scheduler._free_pages == shape.pages


def test_a_prompt_goes_on_in_the_next_forward_of_its_pass_and_in_the_next_pass() -> None:
    scheduler = Scheduler(limits(prefill_tokens=50, forward_tokens=32), pages_of)
    scheduler.add(rows_of([[1] * 5], 12))
    finish_one = [scheduler.admit(), scheduler.next_pass()]
    scheduler.advance(finish_one[1][0])
    scheduler.add(rows_of([[1] * 70], 2))
    passes = [[(group.starts, group.counts) for group in groups] for groups in finish(scheduler)]
    assert passes[:3] == [[((5, 0), (1, 25)), ((25,), (25,))], [((6, 50), (1, 20))], [((7, 70), (1, 1))]]
    assert scheduler.counts.prefill_padding == scheduler.counts.decode_padding == 0


@settings(deadline=None)
@given(st.lists(jobs, min_size=1, max_size=4), shapes)
def test_rows_that_came_earlier_enter_before_all_that_came_later(draws: list[Any], shape: Limits) -> None:
    scheduler, entered = Scheduler(shape, pages_of), list[int]()
    for number, jobs in enumerate(draws):
        rows = rows_of([[1] * prompt for prompt, _ in jobs], [new for _, new in jobs])
        for row in rows:
            row.index = number
        while not scheduler.wants_rows:
            entered += [seat.row.index for seat in scheduler.admit()]
            for group in scheduler.next_pass():
                scheduler.advance(group)
        scheduler.add(rows)
        entered += [seat.row.index for seat in scheduler.admit()]
    assert entered == sorted(entered)


def test_rows_alike_in_length_share_a_micro_batch_and_padding_is_counted() -> None:
    scheduler = Scheduler(limits(rows=6, micro_batch_rows=3, pages=100, prefill_tokens=2000), pages_of)
    scheduler.add(rows_of([[1] * prompt for prompt in (300, 10, 290, 12, 310, 11)], 5))
    passes = finish(scheduler)
    assert [sorted(group.counts) for group in passes[0]] == [[290, 300, 310], [10, 11, 12]]
    assert all(max(group.lengths) - min(group.lengths) <= 20 for groups in passes for group in groups)
    counts = scheduler.counts
    assert (counts.prefill_columns, counts.prefill_padding) == (3 * 310 + 3 * 12, 10 + 20 + 2 + 1)
    assert counts.decode_padding == 4 * (10 + 20 + 2 + 1)
    assert counts.decode_columns == sum(3 * (length + step) for length in (310, 12) for step in range(1, 5))


def test_a_row_leaves_when_it_ends_and_its_pages_admit_the_next() -> None:
    scheduler = Scheduler(limits(rows=2, pages=4), pages_of)
    scheduler.add(rows_of([[1] * 9] * 5, [3, 12, 20, 3, 20]))
    live = [sum(len(group.seats) for group in groups) for groups in finish(scheduler)]
    assert live[:20] == [2] * 20
    assert scheduler.counts.most_reserved_pages == 4


def test_a_long_prompt_is_computed_in_parts_while_others_go_on() -> None:
    scheduler = Scheduler(limits(pages=100, prefill_tokens=100), pages_of)
    scheduler.add(rows_of([[1] * 20], 12))
    scheduler.admit()
    scheduler.advance(scheduler.next_pass()[0])
    scheduler.add(rows_of([[1] * 250], 2))
    widths = [[group.width for group in groups] for groups in finish(scheduler)]
    assert widths[:5] == [[100, 1], [100, 1], [50, 1], [1], [1]]


def test_what_cannot_be_regrouped_stays_together_until_the_last_has_ended() -> None:
    scheduler = Scheduler(limits(rows=3, together=True, keeps_ended=True), pages_of)
    scheduler.add(rows_of([[1] * prompt for prompt in (5, 9, 2, 4)], [3, 1, 6, 2]))
    passes = finish(scheduler)
    assert [len(groups) for groups in passes] == [1] * len(passes)
    assert [len(groups[0].seats) for groups in passes] == [3] * 3 + [1] * 6
    assert all(len({seat.number for seat in groups[0].seats}) == len(groups[0].seats) for groups in passes)


@pytest.mark.parametrize("short", [{"rows": 4}, {"rows": 8, "pages": 4}], ids=["seats", "pages"])
def test_rows_wait_until_there_is_room_for_as_many_as_should_enter_together(short: dict[str, int]) -> None:
    scheduler = Scheduler(limits(entering_rows=2, **short), lambda tokens: 1)
    scheduler.add(rows_of([[1] * 8] * 8, [2, 3, 9, 9, 1, 1, 1, 1]))
    entered = []
    while True:
        entered.append(len(scheduler.admit()))
        if not (groups := scheduler.next_pass()):
            break
        for group in groups:
            scheduler.advance(group)
    assert [count for count in entered if count] == [4, 2, 2]
    assert entered[2:4] == [0, 2], "a place that is free waits for the next one"


def test_static_batches_admit_nobody_before_all_have_ended() -> None:
    scheduler = Scheduler(limits(rows=2, static=True), pages_of)
    scheduler.add(rows_of([[1] * 5] * 4, [2, 9, 2, 9]))
    assert [sum(len(group.seats) for group in groups) for groups in finish(scheduler)] == ([2] * 2 + [1] * 7) * 2


def test_a_row_that_the_pool_could_never_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="row 0 needs 41 pages of a pool of 40"):
        Scheduler(limits(), pages_of).add(rows_of([[1] * 640], 1))
