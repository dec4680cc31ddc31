"""Shares the processors of a node among the ranks that attend on them, one NUMA node after the other."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from zeroinf.hardware.numa import SYSTEM, numbers, processor_nodes


def attention_processors(
    rank: int,
    allowed: Sequence[Collection[int]],
    at_once: float,
    system: Path = SYSTEM,
    *,
    gpu_nodes: Sequence[int | None] = (),
) -> tuple[int, ...]:
    """The processors on which number `rank` of a node's ranks attends, of which each may use those in `allowed`: its
    share of them but for one, which feeds its GPU.

    Ranks that may use the same processors share them. A launcher that has bound each rank to some has shared already,
    and a rank leaves to others what they alone are bound to. Shares are disjoint, unless there are fewer processors
    than ranks, equally large, and as far as may be on one NUMA node each, with both threads of a core. They are dealt
    in the order of the ranks' `gpu_nodes`, the NUMA nodes of their GPUs, so that each is near its GPU where that is
    fair. Of the `at_once` processors whose time all ranks may take, each has an equal part: with more threads they
    would be stopped now and then.
    """
    of_each = [frozenset(one) for one in allowed]
    homes = [-1 if node is None else node for node in gpu_nodes or [None] * len(of_each)]
    mine, nodes = of_each[rank], processor_nodes(system)
    bound = frozenset[int]().union(*(one for one in of_each if len(one) < len(mine)))
    order = sorted(mine - bound or mine, key=lambda number: (nodes.get(number, 0), _core(number, system), number))
    alike = sorted((homes[other], other) for other, one in enumerate(of_each) if one == mine)
    place, places = alike.index((homes[rank], rank)), len(alike)
    share = order[place * len(order) // places : (place + 1) * len(order) // places]
    share.sort(
        key=lambda number: nodes.get(number) != homes[rank]
    )  # who feeds the GPU is near it, and few attend there
    share = share[: int(max(1, min(len(share), at_once / len(of_each))))]
    return tuple(share[1:] or share or order[place % len(order) :][:1])


def _core(number: int, system: Path) -> int:
    """The first of the processors that share a core with this one."""
    return min(numbers(system / f"cpu/cpu{number}/topology/thread_siblings_list"), default=number)
