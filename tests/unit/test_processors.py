"""Ranks of a node share its processors fairly, one NUMA node after the other."""

from __future__ import annotations

from pathlib import Path

import pytest

from zeroinf.hardware.processors import attention_processors


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two nodes of four cores with two threads each, as Linux numbers them."""
    for node, numbers in enumerate(("0-3,8-11", "4-7,12-15")):
        (tmp_path / f"node/node{node}").mkdir(parents=True)
        (tmp_path / f"node/node{node}/cpulist").write_text(numbers + "\n")
    for number in range(16):
        folder = tmp_path / f"cpu/cpu{number}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{number % 8},{number % 8 + 8}\n")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(16)))
    return tmp_path


def test_a_rank_has_whole_cores_of_one_node(system: Path) -> None:
    assert attention_processors(0, 2, system) == (8, 1, 9, 2, 10, 3, 11)
    assert attention_processors(1, 2, system) == (12, 5, 13, 6, 14, 7, 15)
    assert attention_processors(1, 8, system) == (9,)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
def test_shares_are_even_and_leave_one_to_feed_each_gpu(ranks: int, system: Path) -> None:
    shares = [attention_processors(rank, ranks, system) for rank in range(ranks)]
    assert len(set().union(*shares)) == sum(map(len, shares)) == 16 - ranks
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_more_ranks_than_processors_have_one_each(system: Path) -> None:
    assert {len(attention_processors(rank, 40, system)) for rank in range(40)} == {1}


def test_only_what_the_process_may_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {3, 5, 9})
    assert attention_processors(0, 1, tmp_path) == (5, 9)
