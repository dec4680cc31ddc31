"""Ranks of a node share its processors fairly, one NUMA node after the other."""

from __future__ import annotations

from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch

from zeroinf.distributed.world import World
from zeroinf.hardware import numa
from zeroinf.hardware.mapped_memory import map_memory
from zeroinf.hardware.numa import gpu_node, own_processors, prefer_nodes
from zeroinf.hardware.processors import attention_processors
from zeroinf.service.loaded import processors_of


@pytest.fixture
def system(tmp_path: Path) -> Path:
    """Two nodes of four cores with two threads each, as Linux numbers them."""
    for node, numbers in enumerate(("0-3,8-11", "4-7,12-15")):
        (tmp_path / f"node/node{node}").mkdir(parents=True)
        (tmp_path / f"node/node{node}/cpulist").write_text(numbers + "\n")
    for number in range(16):
        folder = tmp_path / f"cpu/cpu{number}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{number % 8},{number % 8 + 8}\n")
    return tmp_path


EVERY = range(16)


def test_a_rank_has_whole_cores_of_one_node(system: Path) -> None:
    assert attention_processors(0, [EVERY] * 2, inf, system) == (8, 1, 9, 2, 10, 3, 11)
    assert attention_processors(1, [EVERY] * 2, inf, system) == (12, 5, 13, 6, 14, 7, 15)
    assert attention_processors(1, [EVERY] * 8, inf, system) == (9,)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
def test_shares_are_even_and_leave_one_to_feed_each_gpu(ranks: int, system: Path) -> None:
    shares = [attention_processors(rank, [EVERY] * ranks, inf, system) for rank in range(ranks)]
    assert len(set().union(*shares)) == sum(map(len, shares)) == 16 - ranks
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_more_ranks_than_processors_have_one_each(system: Path) -> None:
    assert {len(attention_processors(rank, [EVERY] * 40, inf, system)) for rank in range(40)} == {1}


def test_what_a_launcher_has_bound_to_a_rank_is_not_divided_again(system: Path) -> None:
    halves = [range(8), range(8, 16)]
    assert attention_processors(0, halves, inf, system) == (1, 2, 3, 4, 5, 6, 7)
    assert attention_processors(1, halves, inf, system) == (9, 10, 11, 12, 13, 14, 15)
    sockets = [{0, 1, 2, 3, 8, 9, 10, 11}] * 2 + [{4, 5, 6, 7, 12, 13, 14, 15}] * 2
    assert [attention_processors(rank, sockets, inf, system) for rank in range(4)] == [
        (8, 1, 9), (10, 3, 11), (12, 5, 13), (14, 7, 15),
    ]  # fmt: skip
    assert attention_processors(0, [EVERY, {4, 5, 6}], inf, system) == (8, 1, 9, 2, 10, 3, 11, 12, 13, 14, 7, 15)


def test_a_rank_has_the_processors_of_the_node_of_its_gpu(system: Path) -> None:
    first, second = (8, 1, 9, 2, 10, 3, 11), (12, 5, 13, 6, 14, 7, 15)

    def share(rank: int, gpu_nodes: list[int | None], allowed: Any = None, at_once: float = inf) -> tuple[int, ...]:
        every = allowed or [EVERY] * len(gpu_nodes)
        return attention_processors(rank, every, at_once, system, gpu_nodes=gpu_nodes)

    assert [share(rank, [1, 0]) for rank in (0, 1)] == [second, first]
    assert [share(rank, [1, 1]) for rank in (0, 1)] == [first, second], "none has less than its share"
    assert [share(rank, [None, None]) for rank in (0, 1)] == [first, second]
    four = [share(rank, [1, 0, 1, 0]) for rank in range(4)]
    assert four == [(12, 5, 13), (8, 1, 9), (14, 7, 15), (10, 3, 11)]
    assert share(0, [1]) == (*second, 0, *first), "one rank has all, of which one on its GPU's node is left to feed it"
    assert share(0, [1], at_once=6) == second[:5]
    bound = [range(4), range(4), range(4, 8), range(4, 8)]
    assert [share(rank, [1, 1, 0, 0], bound) for rank in range(4)] == [(1,), (3,), (5,), (7,)], "the user's word holds"


def test_the_node_of_a_gpu_is_found_by_its_place_on_the_bus(
    system: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numa, "read_bus_id", lambda index: [f"0000:{index}b:00.0", None][index > 3])
    for index, node in enumerate(("1", "-1", "0")):
        (tmp_path / f"pci/0000:{index}b:00.0").mkdir(parents=True)
        (tmp_path / f"pci/0000:{index}b:00.0/numa_node").write_text(f"{node}\n")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 5})
    assert [gpu_node(index, system, tmp_path / "pci") for index in range(5)] == [1, None, 0, None, None]
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    gpu_node.cache_clear()
    assert gpu_node(0, system, tmp_path / "pci") is None, "the user has bound the process to another node"
    assert gpu_node(2, system, tmp_path / "pci") == 0


def test_pages_come_to_lie_on_a_node_where_the_kernel_lets_them() -> None:
    memory, maps = map_memory(1 << 21), Path("/proc/self/numa_maps")
    assert not prefer_nodes(memory, ())
    if prefer_nodes(memory, {0}) and maps.is_file():  # else the kernel, or a container, does not let it
        assert "prefer:0" in maps.read_text(encoding="utf-8")
    memory[:] = b"1" * len(memory)
    assert not prefer_nodes(map_memory(1 << 21), {1023}), "there is no such node, and nothing is raised"


@pytest.mark.parametrize(
    ("at_once", "ranks", "threads"), [(6, 1, 5), (6, 2, 2), (1.5, 1, 1), (0.5, 2, 1), (40, 1, 15), (inf, 2, 7)]
)
def test_a_container_has_no_more_threads_than_time(at_once: float, ranks: int, threads: int, system: Path) -> None:
    shares = [attention_processors(rank, [EVERY] * ranks, at_once, system) for rank in range(ranks)]
    assert {len(share) for share in shares} == {threads}


class Ranks:
    """The control channel of a rank of two nodes of two ranks, of which a launcher has bound those of the second."""

    world = World(rank=2, size=4, local_rank=0, local_size=2, launched=True)

    def all_gather(self, mine: Any) -> list[Any]:
        return [(0, (0, 1, 2, 3), None), (0, (0, 1, 2, 3), None), mine, (2, (7, 8), 0)]


def test_ranks_tell_each_other_what_they_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {3, 5, 9})
    assert own_processors() == (3, 5, 9)
    assert set(processors_of(Ranks(), torch.device("cpu"))) < {3, 5, 9}  # type: ignore[arg-type]
    assert len(processors_of(Ranks(), torch.device("cpu"))) == 2  # type: ignore[arg-type]
