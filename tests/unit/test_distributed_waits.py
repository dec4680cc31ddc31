"""Ranks that wait say for whom; those that wait for each other end, and nobody who works is disturbed."""

from __future__ import annotations

import time
from typing import Any

import pytest
from ranks import FORK, on_ranks

from zeroinf.distributed import waits
from zeroinf.distributed.control import Control
from zeroinf.distributed.waits import WaitWatch
from zeroinf.errors import RankError


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What was said and how it ended, by all ranks; everything happens sooner than in a run."""
    for name, seconds in {"_TICK_S": 0.25, "_REPORT_AFTER_S": 0.5, "_DEADLOCK_AFTER_S": 1.5, "_GRACE_S": 2.0}.items():
        monkeypatch.setattr(waits, name, seconds)
    return FORK.SimpleQueue()


def watch(control: Control, told: Any) -> WaitWatch:
    def ended(message: str, reports: bool) -> None:
        told.put((control.world.rank, "speaks" if reports else "silent", message))

    return WaitWatch(control, lambda text: told.put((control.world.rank, "note", text)), ended)


def heard(told: Any) -> list[tuple[int, str, str]]:
    found = []
    while not told.empty():
        found.append(told.get())
    return found


@pytest.mark.parametrize("elsewhere", [0, 1])
def test_ranks_that_wait_at_different_places_end_with_who_waits_for_whom(elsewhere: int, told: Any) -> None:
    def body(control: Control) -> None:
        watching = watch(control, told)
        control.all_gather(None)
        try:
            if control.world.rank == elsewhere:
                with control.activity.waiting("the results of all ranks", range(3)):
                    time.sleep(600)
            control.all_gather(None)
        except RankError:  # another rank has ended before this one
            watching.defer_to_deadlock()

    _, codes = on_ranks(3, body)
    assert codes == [RankError.exit_code] * 3
    found = heard(told)
    others = ", ".join(str(rank) for rank in range(3) if rank != elsewhere)
    assert found[0][:2] == (0, "note"), "said before it ends"
    ends = [each for each in found if each[1] != "note"]
    assert sorted(each[:2] for each in ends) == [(0, "speaks"), (1, "silent"), (2, "silent")]
    for _, _, message in ends:
        assert message.startswith("ranks wait for each other, and none will come: ")
        assert f"ranks {others} wait at gather 3 of ranks 0 to 2 for rank {elsewhere}, which waits at the results" in (
            message
        )


def test_a_rank_that_works_is_waited_for_and_named_with_what_it_does(told: Any) -> None:
    def body(control: Control) -> float:
        watching, since = watch(control, told), time.monotonic()
        if control.world.rank == 1:
            control.activity.now("loads weights")
            time.sleep(2.5)
        control.all_gather(None)
        waited_s = time.monotonic() - since
        watching.stop()
        control.all_gather(None)
        return waited_s

    (waited_s, _), codes = on_ranks(2, body)
    assert codes == [0, 0]
    found = heard(told)
    assert all(text.startswith("rank 0 waits at gather 2 of ranks 0 to 1 for rank 1, which ") for _, _, text in found)
    assert "which loads weights (for " in found[-1][2]
    assert waits._REPORT_AFTER_S * 2 ** (len(found) - 1) <= waited_s, "twice as late each time"


def test_a_rank_that_nobody_joins_says_so_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waits, "_REPORT_AFTER_S", 0.05)
    notes: list[str] = []
    with waits.report_long_wait("all 2 ranks to start", notes.append):
        deadline = time.monotonic() + 60
        while len(notes) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert notes[:2] == ["waits for all 2 ranks to start (for 0 s)"] * 2


def test_ranks_of_several_groups_that_get_on_are_left_alone(told: Any) -> None:
    def body(control: Control) -> str:
        watching, part = watch(control, told), control.subgroup(2)
        for _ in range(20):  # longer than ranks may wait for each other
            time.sleep(0.1 * part.world.rank)
            part.all_gather(None)
        control.all_gather(None)
        watching.stop()
        control.all_gather(None)
        return "done"

    assert on_ranks(4, body) == (["done"] * 4, [0] * 4)
    assert all(kind == "note" for _, kind, _ in heard(told))


@pytest.mark.parametrize("gets_on", [True, False])
def test_a_rank_in_a_pass_of_all_ranks_is_waited_for_as_long_as_its_layers_run(
    gets_on: bool, told: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waits, "_PASS_STALLED_AFTER_S", 2.0)

    def body(control: Control) -> str:
        watching = watch(control, told)
        control.all_gather(None)
        if control.world.rank == 1:
            control.activity.now("is in pass 7", in_pass=True)
            for _ in range(30):
                time.sleep(0.1)
                control.activity.step() if gets_on else None
        try:
            control.all_gather(None)
        except RankError:
            watching.defer_to_deadlock()
        watching.stop()
        control.all_gather(None)
        return "done"

    found, codes = on_ranks(2, body)
    assert (found, codes) == ((["done"] * 2, [0, 0]) if gets_on else ([None] * 2, [RankError.exit_code] * 2))
    assert "for rank 1, which is in pass 7" in heard(told)[-1][2]
