"""Replaces properties of a machine by values that the user gives (`--gpu-memory`, `--link-gbps`, ...)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from zeroinf.errors import UsageError
from zeroinf.hardware.machine import Disk, Gpu, Machine, Memory
from zeroinf.hardware.rates import Rates
from zeroinf.sizes import Share, limit_of

_NO_FOLDER = Path("/nvme")  # where --nvme-space lies when no folder was named


def override(
    machine: Machine,
    rates: Rates,
    *,
    gpu_memory: int | Share | None = None,
    host_memory: int | None = None,
    nvme_space: int | None = None,
    num_gpus: int | None = None,
    link_gbps: float | None = None,
    nvme_gbps: float | None = None,
) -> tuple[Machine, Rates]:
    """The machine and rates with what the flags of these names say; None leaves things as they are.

    `num_gpus` keeps the first GPUs, or repeats the last. `gpu_memory` is a cap on each; where there are no GPUs a size
    makes them, one unless `num_gpus` says how many. Host memory and disk space may be more than there is, since the
    machine need not be here; all that is added counts as free. `link_gbps` is the rate of each GPU's own link.

    Raises:
        UsageError: GPUs without a size, or a rate for something that is not there.
    """
    machine = replace(
        machine,
        gpus=_gpus(machine.gpus, num_gpus, gpu_memory),
        memory=_memory(machine.memory, host_memory),
        disks=_disks(machine.disks, nvme_space),
    )
    if link_gbps is not None:
        if not machine.gpus:
            raise _useless("--link-gbps", "no GPU", "name a --machine with GPUs, or add --gpu-memory")
        links = {n: n * link_gbps for n in range(1, len(machine.gpus) + 1)}
        rates = rates.without("link_gbps", "links_gbps").updated(
            Rates.of("given", link_gbps=link_gbps, links_gbps=links)
        )
    if nvme_gbps is not None:
        if not machine.disks:
            raise _useless("--nvme-gbps", "no disk", "add --nvme-path or --nvme-space")
        given = Rates.of("given", disk_gbps={disk.volume: nvme_gbps for disk in machine.disks})
        rates = rates.without("disk_gbps", "disk_gbps_by_requests").updated(given)
    return machine, rates


def _gpus(gpus: tuple[Gpu, ...], count: int | None, cap: int | Share | None) -> tuple[Gpu, ...]:
    if not gpus and isinstance(cap, Share):
        raise _useless(f"--gpu-memory {cap}", "no GPU", "name a --machine with GPUs, or a size")
    if not gpus and isinstance(cap, int):
        gpus = (_generic_gpu(cap),)
    if count is not None:
        if not gpus:
            raise _useless("--num-gpus", "no GPU", "add --gpu-memory to say how large they are, or name a --machine")
        more = (replace(gpus[-1], index=index, uuid=None) for index in range(len(gpus), count))
        gpus = (*gpus[:count], *more)
    return tuple(_capped(gpu, limit_of(cap, gpu.total_bytes)) for gpu in gpus)


def _capped(gpu: Gpu, cap_bytes: int | None) -> Gpu:
    if cap_bytes is None:
        return gpu
    return replace(gpu, total_bytes=min(gpu.total_bytes, cap_bytes), free_bytes=min(gpu.free_bytes, cap_bytes))


def _generic_gpu(size_bytes: int) -> Gpu:
    return Gpu(
        index=0,
        name="generic GPU",
        total_bytes=size_bytes,
        free_bytes=size_bytes,
        other_bytes=0,
        pcie_generation=None,
        pcie_width=None,
        capability=None,
    )


def _memory(memory: Memory, size_bytes: int | None) -> Memory:
    if size_bytes is None:
        return memory
    added_bytes = max(0, size_bytes - memory.total_bytes)
    available_bytes = min(memory.available_bytes, size_bytes) + added_bytes
    return replace(memory, total_bytes=size_bytes, available_bytes=available_bytes, cgroup_limit_bytes=None)


def _disks(disks: tuple[Disk, ...], space_bytes: int | None) -> tuple[Disk, ...]:
    if space_bytes is None:
        return disks
    if not disks:
        return (
            Disk(
                path=_NO_FOLDER,
                exists=True,
                writable=True,
                free_bytes=space_bytes,
                total_bytes=space_bytes,
                filesystem="",
                o_direct=True,
            ),
        )
    return tuple(
        replace(disk, free_bytes=space_bytes, total_bytes=max(disk.total_bytes, space_bytes)) for disk in disks
    )


def _useless(flag: str, lack: str, hint: str) -> UsageError:
    return UsageError(f"{flag} has no effect: the machine has {lack}", hint=hint)
