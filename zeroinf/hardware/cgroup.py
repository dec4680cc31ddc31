"""Reads the limits of memory and of processors' time that a container or a batch system puts on this process: cgroup
v1, v2, or both.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from pathlib import Path, PurePosixPath

# Version 1 writes "no limit" as the largest page-aligned 64-bit number; no machine comes near a quarter of it.
NO_LIMIT_BYTES = 1 << 61


@dataclass(frozen=True, kw_only=True, slots=True)
class CgroupMemory:
    """The smallest limit above this process, and the least that may still be allocated under any limit above it."""

    limit_bytes: int
    available_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layout:
    """Names of one cgroup version. v1 needs the `total_` figures: its plain ones leave out child groups."""

    limit: str
    usage: str
    file_pages: tuple[str, str]


_V1 = _Layout(
    limit="memory.limit_in_bytes",
    usage="memory.usage_in_bytes",
    file_pages=("total_active_file", "total_inactive_file"),
)
_V2 = _Layout(limit="memory.max", usage="memory.current", file_pages=("active_file", "inactive_file"))
_LAYOUTS = {1: _V1, 2: _V2}


def read_cgroup_memory(proc: Path = Path("/proc"), root: Path = Path("/sys/fs/cgroup")) -> CgroupMemory | None:
    """The memory limit on this process, or None where there is none.

    Walks from the process's own group up to the root of each memory hierarchy: every group limits its children.
    Inside a container the path in /proc may be the host's; folders that are not there are passed over, and the root,
    where the container's own group is mounted, is always read.
    """
    groups = _groups("memory", proc, root)
    limited = [found for version, folder in groups if (found := _read_group(folder, _LAYOUTS[version]))]
    if not limited:
        return None
    return CgroupMemory(
        limit_bytes=min(group.limit_bytes for group in limited),
        available_bytes=min(group.available_bytes for group in limited),
    )


def read_cgroup_processors(proc: Path = Path("/proc"), root: Path = Path("/sys/fs/cgroup")) -> float:
    """The number of processors whose time this process may take together with others of its groups, which is not a
    whole one; infinite where there is no limit."""
    return min((_read_quota(folder, version) for version, folder in _groups("cpu", proc, root)), default=inf)


def _read_quota(folder: Path, version: int) -> float:
    if version == 1:
        parts = [_read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
    else:
        parts = _read(folder / "cpu.max").split()
    if len(parts) != 2 or not all(part.isdigit() for part in parts):  # "max", or -1
        return inf
    return int(parts[0]) / int(parts[1])


def _groups(controller: str, proc: Path, root: Path) -> Iterator[tuple[int, Path]]:
    """The version and folder of every group above this process, for lines such as `4:memory:/a/b` (v1) and `0::/a/b`
    (v2)."""
    for line in _read(proc / "self" / "cgroup").splitlines():
        hierarchy, controllers, path = line.split(":", 2)
        if hierarchy == "0" and not controllers:
            for mount in (root, root / "unified"):
                yield from ((2, folder) for folder in _upward(mount, path))
        elif controller in controllers.split(","):
            yield from ((1, folder) for folder in _upward(root / controller, path))


def _upward(mount: Path, path: str) -> Iterator[Path]:
    inside = PurePosixPath(path.lstrip("/"))
    return (mount / folder for folder in (inside, *inside.parents))


def _read_group(folder: Path, layout: _Layout) -> CgroupMemory | None:
    limit = _read(folder / layout.limit).strip()
    if not limit.isdigit() or int(limit) >= NO_LIMIT_BYTES:
        return None
    usage = int(_read(folder / layout.usage) or 0)
    statistics = dict(line.split(maxsplit=1) for line in _read(folder / "memory.stat").splitlines())
    reclaimable = sum(int(statistics.get(name, 0)) for name in layout.file_pages)
    held = usage - min(usage, reclaimable)
    return CgroupMemory(limit_bytes=int(limit), available_bytes=max(0, int(limit) - held))


def _read(path: Path) -> str:
    """The file's text; empty where it is missing or may not be read."""
    try:
        return os.fsdecode(path.read_bytes())  # names of groups, to be opened
    except OSError:
        return ""
