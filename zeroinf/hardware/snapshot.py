"""Reads this machine's present state into a `Machine`. Neither torch nor a GPU is started."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
from collections.abc import Iterable
from pathlib import Path

import psutil

from zeroinf.hardware.cgroup import read_cgroup_memory
from zeroinf.hardware.disk import read_disk
from zeroinf.hardware.gpus import read_driver, read_gpus
from zeroinf.hardware.machine import Machine, Memory

PACKAGES = ("torch", "deepspeed", "transformers", "accelerate", "safetensors", "greenlet", "psutil", "nvidia-ml-py")

# linux/capability.h
CAP_IPC_LOCK = 14


def read_machine(disks: Iterable[Path] = ()) -> Machine:
    """This machine as it is now, with what the folders `disks` offer. Neither torch nor a GPU is started."""
    return Machine(
        gpus=read_gpus(),
        memory=read_memory(),
        disks=tuple(read_disk(path) for path in disks),
        cores=len(os.sched_getaffinity(0)),
        versions=read_versions(),
        hostname=platform.node(),
        driver=read_driver(),
    )


def read_memory(
    *,
    proc: Path = Path("/proc"),
    cgroup: Path = Path("/sys/fs/cgroup"),
    shared_memory: Path = Path("/dev/shm"),
    nodes: Path = Path("/sys/devices/system/node"),
) -> Memory:
    """Host memory as this process may use it."""
    physical = psutil.virtual_memory()
    limit = read_cgroup_memory(proc, cgroup)
    return Memory(
        total_bytes=min(physical.total, limit.limit_bytes) if limit else physical.total,
        available_bytes=min(physical.available, limit.available_bytes) if limit else physical.available,
        cgroup_limit_bytes=limit.limit_bytes if limit else None,
        swap_bytes=psutil.swap_memory().total,
        shared_memory_bytes=shutil.disk_usage(shared_memory).free if shared_memory.is_dir() else 0,
        memlock_bytes=read_memlock(proc),
        numa_nodes=max(1, sum(1 for _ in nodes.glob("node[0-9]*"))),
    )


def read_memlock(proc: Path = Path("/proc")) -> int | None:
    """Bytes this process may lock in memory (the soft RLIMIT_MEMLOCK), None for no limit."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY or _may_lock_all(proc) else soft


def _may_lock_all(proc: Path) -> bool:
    """Whether CAP_IPC_LOCK lifts the limit; it does in the first user namespace only, not in rootless containers."""
    try:
        status = (proc / "self" / "status").read_text(encoding="utf-8", errors="replace")
        user_map = (proc / "self" / "uid_map").read_text().split()
    except OSError:
        return False
    effective = next((line.split()[1] for line in status.splitlines() if line.startswith("CapEff:")), "0")
    is_first_namespace = user_map == ["0", "0", str((1 << 32) - 1)]
    return is_first_namespace and bool(int(effective, 16) >> CAP_IPC_LOCK & 1)


def read_versions() -> dict[str, str]:
    """Versions of Python and of the installed ones of `PACKAGES`, without importing any."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
