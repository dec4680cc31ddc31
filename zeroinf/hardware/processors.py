"""Shares the processors of a node among the ranks that attend on them, one NUMA node after the other."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path

_SYSTEM = Path("/sys/devices/system")


def own_processors() -> tuple[int, ...]:
    """The processors that this process may use, as a launcher or a container has it."""
    return tuple(sorted(os.sched_getaffinity(0)))


def attention_processors(
    rank: int, allowed: Sequence[Collection[int]], at_once: float, system: Path = _SYSTEM
) -> tuple[int, ...]:
    """The processors on which number `rank` of a node's ranks attends, of which each may use those in `allowed`: its
    share of them but for one, which feeds its GPU.

    Ranks that may use the same processors share them. A launcher that has bound each rank to some has shared already,
    and a rank leaves to others what they alone are bound to. Shares are disjoint, unless there are fewer processors
    than ranks, and as far as may be on one NUMA node each, with both threads of a core. Of the `at_once` processors
    whose time all ranks may take, each has an equal part: with more threads they would be stopped now and then.
    """
    of_each = [frozenset(one) for one in allowed]
    mine, nodes = of_each[rank], _nodes(system)
    bound = frozenset[int]().union(*(one for one in of_each if len(one) < len(mine)))
    order = sorted(mine - bound or mine, key=lambda number: (nodes.get(number, 0), _core(number, system), number))
    place, places = of_each[:rank].count(mine), of_each.count(mine)
    share = order[place * len(order) // places : (place + 1) * len(order) // places]
    share = share[: int(max(1, min(len(share), at_once / len(of_each))))]
    return tuple(share[1:] or share or order[place % len(order) :][:1])


def _nodes(system: Path) -> dict[int, int]:
    """The NUMA node of each processor; empty where the kernel does not say."""
    found = {}
    for folder in system.glob("node/node[0-9]*"):
        for number in _numbers(folder / "cpulist"):
            found[number] = int(folder.name.removeprefix("node"))
    return found


def _core(number: int, system: Path) -> int:
    """The first of the processors that share a core with this one."""
    return min(_numbers(system / f"cpu/cpu{number}/topology/thread_siblings_list"), default=number)


def _numbers(file: Path) -> list[int]:
    """The numbers of a list such as 0-3,8; none where there is no such file."""
    found = list[int]()
    with suppress(OSError, ValueError):
        for part in filter(None, file.read_text(encoding="utf-8").strip().split(",")):
            first, _, last = part.partition("-")
            found += range(int(first), int(last or first) + 1)
    return found
