"""Shares the processors of a node among the ranks that attend on them, one NUMA node after the other."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

_SYSTEM = Path("/sys/devices/system")


def attention_processors(rank: int, ranks: int, system: Path = _SYSTEM) -> tuple[int, ...]:
    """The processors on which number `rank` of a node's `ranks` attends: its share of those that this process may use,
    but for one, which feeds its GPU.

    Shares are disjoint, unless there are fewer processors than ranks, and as far as may be on one NUMA node each, with
    both threads of a core.
    """
    nodes = _nodes(system)
    allowed = sorted(os.sched_getaffinity(0), key=lambda number: (nodes.get(number, 0), _core(number, system), number))
    share = allowed[rank * len(allowed) // ranks : (rank + 1) * len(allowed) // ranks]
    return tuple(share[1:] or share or allowed[rank % len(allowed) :][:1])


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
        for part in filter(None, file.read_text().strip().split(",")):
            first, _, last = part.partition("-")
            found += range(int(first), int(last or first) + 1)
    return found
