"""A machine's rates and its software's overheads as numbers: measured, from a data sheet, or given by the user."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from zeroinf.hardware.machine import Disk

RateOrigin = Literal["measured", "data sheet", "given"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Rates of one machine; None is not known. `*_gbps` is GB/s (10^9 bytes), `*_tflops` 10^12 operations a second.

    `origins` says where a rate comes from; one that is not named there was given.
    """

    link_gbps: float | None = None
    """Page-locked host memory to one GPU while the other links rest; of several GPUs, the slowest."""

    links_gbps: Mapping[int, float] | None = None
    """The same by the number of GPUs that pull at once, all together; n GPUs that wait for each other get this."""

    disk_gbps: Mapping[str, float] | None = None
    """O_DIRECT reads by `Disk.volume`, with as many requests in flight as serve it best."""

    disk_gbps_by_requests: Mapping[str, Mapping[int, float]] | None = None
    """The same by the number of requests in flight, each of 4 MiB."""

    disk_reads_per_s: Mapping[str, float] | None = None
    """Reads of a page each at any place of a file, as rows of tables are read, by `Disk.volume`."""

    matmul_tflops: Mapping[str, Mapping[int, float]] | None = None
    """By dtype ("bfloat16", "float16", "float32") and rows: rows x 8192 times an 8192 x 8192 weight, on one GPU."""

    hbm_gbps: float | None = None
    """Traffic of a copy inside one GPU's memory: bytes read plus bytes written."""

    all_gather_gbps: Mapping[int, float] | None = None
    """By the number of GPUs: bytes of the whole result that each of them holds afterwards, a second."""

    context_bytes: int | None = None
    """What a process holds of a GPU beside torch's reserved memory, once all kinds of kernels have run."""

    process_bytes: int | None = None
    """Host memory of the same process, its libraries loaded."""

    workspace_bytes: int | None = None
    """What torch's allocator keeps for matmul libraries when every tensor is gone."""

    nccl_bytes: Mapping[int, int] | None = None
    """By the number of GPUs: what each process holds more of its GPU after NCCL's start and an all-gather."""

    launch_s: float | None = None
    """Host time of one operator whose kernel has next to nothing to do."""

    model_launch_s: float | None = None
    """Host time of a kernel that a transformers model launches, its Python included."""

    triton_launch_s: float | None = None
    """Host time of a launch of a Triton kernel that has next to nothing to do."""

    page_lock_gbps: float | None = None
    """cudaHostRegister on memory of one process that has just been written."""

    host_copy_gbps: float | None = None
    """Bytes copied a second by 8 threads into memory of one process that nobody has touched yet."""

    host_recopy_gbps: float | None = None
    """The same into memory that has been written before, as a load's stages have."""

    host_read_gbps: float | None = None
    """Host memory read by all cores but one, as attention on the CPU reads it."""

    host_read_beside_link_gbps: float | None = None
    """The same while one GPU's link copies from there."""

    link_beside_read_gbps: float | None = None
    """The rate of that link meanwhile."""

    shared_page_lock_gbps: float | None = None
    """`page_lock_gbps` of memory that several ranks share: its pages are small, as a rule."""

    shared_copy_gbps: float | None = None
    """`host_copy_gbps` of such memory."""

    origins: Mapping[str, RateOrigin] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if strangers := sorted(set(self.origins) - set(self.known)):
            raise ValueError(f"an origin is given for {', '.join(strangers)}, but no rate")
        for name, rate in self.known.items():
            if wrong := [
                n for n in _numbers(rate) if not 0 <= n < math.inf or (n == 0 and not name.endswith("_bytes"))
            ]:
                raise ValueError(f"{name} cannot be {wrong[0]}")

    @classmethod
    def of(cls, origin: RateOrigin, **rates: Any) -> Rates:
        """Rates of one origin; None stays unknown."""
        known = {name: rate for name, rate in rates.items() if rate is not None}
        return cls(**known, origins=dict.fromkeys(known, origin))

    @property
    def known(self) -> dict[str, Any]:
        """The rates that are not None, by name."""
        rates = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "origins"}
        return {name: rate for name, rate in rates.items() if rate is not None}

    def origin(self, name: str) -> RateOrigin:
        """The origin of the rate `name`: measured, published, given or assumed."""
        return self.origins.get(name, "given")

    def updated(self, newer: Rates) -> Rates:
        """These, with what `newer` knows put in their place; of a table (by disk, by GPUs), each entry by itself."""
        known: dict[str, Any] = {
            name: {**(getattr(self, name) or {}), **rate} if isinstance(rate, Mapping) else rate
            for name, rate in newer.known.items()
        }
        origins: dict[str, RateOrigin] = {name: newer.origin(name) for name in known}
        return replace(self, **known, origins={**self.origins, **origins})

    def without(self, *names: str) -> Rates:
        """These, the rates `names` unknown."""
        origins = {name: origin for name, origin in self.origins.items() if name not in names}
        unknown: dict[str, Any] = dict.fromkeys(names)
        return replace(self, **unknown, origins=origins)

    def only(self, *names: str) -> Rates:
        """The rates `names` of these, all others unknown."""
        return self.without(*(name for name in self.known if name not in names))

    def of_disk(self, disk: Disk) -> float | None:
        """The best read rate of a folder's disk in GB/s, None where it is not known."""
        return (self.disk_gbps or {}).get(disk.volume)


def _numbers(rate: Any) -> Iterator[float]:
    if isinstance(rate, Mapping):
        for part in rate.values():
            yield from _numbers(part)
    else:
        yield rate
