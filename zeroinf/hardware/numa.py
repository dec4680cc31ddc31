"""NUMA nodes: which GPU and which processors belong to which, and on which one the pages of a mapping are to lie.

Everything is best effort: where the kernel names no nodes, or the user has bound the process, nothing is changed.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
from collections.abc import Collection
from contextlib import suppress
from functools import cache
from pathlib import Path

from zeroinf.hardware.gpus import read_bus_id

SYSTEM, PCI = Path("/sys/devices/system"), Path("/sys/bus/pci/devices")
_PREFERRED, _INTERLEAVE = 1, 3  # linux/mempolicy.h
_MBIND = {"x86_64": 237, "aarch64": 235}
_GET_MEMPOLICY = {"x86_64": 239, "aarch64": 236}
_MOST_NODES = 1024
_WORD_BITS = 8 * ctypes.sizeof(ctypes.c_ulong)


def own_processors() -> tuple[int, ...]:
    """The processors that this process may use, as a launcher or a container has it."""
    return tuple(sorted(os.sched_getaffinity(0)))


@cache
def gpu_node(index: int, system: Path = SYSTEM, pci: Path = PCI) -> int | None:
    """The NUMA node that the visible GPU `index` is connected to. None where the kernel does not say, and where none of
    the processors that this process may use is there: whoever has bound it wants it elsewhere."""
    bus = read_bus_id(index)
    if bus is None:
        return None
    try:
        node = int((pci / bus / "numa_node").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    nodes = processor_nodes(system)
    return node if node in {nodes.get(number) for number in own_processors()} else None


def processor_nodes(system: Path = SYSTEM) -> dict[int, int]:
    """The NUMA node of each processor; empty where the kernel does not say."""
    found = {}
    for folder in system.glob("node/node[0-9]*"):
        for number in numbers(folder / "cpulist"):
            found[number] = int(folder.name.removeprefix("node"))
    return found


def numbers(file: Path) -> list[int]:
    """The numbers of a list such as 0-3,8; none where there is no such file."""
    found = list[int]()
    with suppress(OSError, ValueError):
        for part in filter(None, file.read_text(encoding="utf-8").strip().split(",")):
            first, _, last = part.partition("-")
            found += range(int(first), int(last or first) + 1)
    return found


def prefer_nodes(memory: mmap.mmap, nodes: Collection[int]) -> bool:
    """Let pages of `memory` that nobody has touched come to lie on the one of `nodes`, or on all of them by turns;
    elsewhere where these are full. False where nothing has changed: there are none, the process was started with a
    policy of its own (numactl), or the kernel refuses, as in some containers."""
    machine = platform.machine()
    if not nodes or max(nodes) >= _MOST_NODES or machine not in _MBIND:
        return False
    system = ctypes.CDLL(None, use_errno=True).syscall
    policy = ctypes.c_int(-1)
    nothing = ctypes.c_ulong(0)
    if system(_GET_MEMPOLICY[machine], ctypes.byref(policy), None, nothing, None, nothing) or policy.value:
        return False
    mask = (ctypes.c_ulong * (_MOST_NODES // _WORD_BITS))()
    for node in nodes:
        mask[node // _WORD_BITS] |= 1 << node % _WORD_BITS
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    mode = ctypes.c_int(_PREFERRED if len(set(nodes)) == 1 else _INTERLEAVE)
    size, most = ctypes.c_ulong(len(memory)), ctypes.c_ulong(_MOST_NODES + 1)
    return not system(_MBIND[machine], ctypes.c_void_p(start), size, mode, mask, most, ctypes.c_uint(0))
