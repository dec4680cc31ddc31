"""The description of a machine that a plan needs. The machine may be this one or another."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One visible GPU.

    `index` counts visible GPUs, as `cuda:index` does. `other_bytes` is what other processes hold. `pcie_generation` is
    the best that card and slot reach together (an idle link reports less), `pcie_width` the lanes in use. Where the
    driver does not tell, sizes are 0 and all else is None.
    """

    index: int
    name: str
    total_bytes: int
    free_bytes: int
    other_bytes: int
    pcie_generation: int | None
    pcie_width: int | None
    capability: tuple[int, int] | None
    uuid: str | None = None
    is_unified: bool = False
    """It has no memory of its own: what it takes, the host lacks (GB10, Jetson)."""

    def __post_init__(self) -> None:
        _refuse_negative_sizes(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Host memory. `total_bytes` and `available_bytes` already heed the cgroup limit.

    `shared_memory_bytes` is what is free in /dev/shm; `memlock_bytes` is what one process may lock, None for no limit.
    """

    total_bytes: int
    available_bytes: int
    cgroup_limit_bytes: int | None
    swap_bytes: int
    shared_memory_bytes: int
    memlock_bytes: int | None
    numa_nodes: int

    def __post_init__(self) -> None:
        _refuse_negative_sizes(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Disk:
    """A folder that weights may rest in. Where `exists` is false, all else is zero, empty or false.

    `free_bytes` is what an ordinary user may still write; `filesystem` is the kernel's word: ext4, xfs, tmpfs, nfs4.
    `mount` is the folder where that file system begins, `device` what is mounted there; None and empty where unknown.
    """

    path: Path
    exists: bool
    writable: bool
    free_bytes: int
    total_bytes: int
    filesystem: str
    o_direct: bool
    mount: Path | None = None
    device: str = ""

    def __post_init__(self) -> None:
        _refuse_negative_sizes(self)

    @property
    def volume(self) -> str:
        """The key under which rates are kept: all folders of one file system share its disk."""
        return str(self.mount or self.path)


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """A snapshot of one machine. `versions` holds "python" and the installed packages by distribution name.

    `driver` is the version of the NVIDIA driver, None where there is none.
    """

    gpus: tuple[Gpu, ...]
    memory: Memory
    disks: tuple[Disk, ...]
    cores: int
    versions: dict[str, str] = field(default_factory=dict)
    hostname: str = ""
    driver: str | None = None


def _refuse_negative_sizes(part: Gpu | Memory | Disk) -> None:
    for entry in fields(part):
        size = getattr(part, entry.name)
        if entry.name.endswith("_bytes") and size is not None and size < 0:
            raise ValueError(f"{entry.name} cannot be {size}")
