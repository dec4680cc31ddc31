"""Determines the rates with which a plan is timed: measured ones, or estimates where nothing was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from zeroinf.hardware.machine import Disk, Gpu, Machine
from zeroinf.hardware.rates import Rates
from zeroinf.planner.memory import Overhead, TermOrigin
from zeroinf.planner.timing import Speeds

# GB/s of one lane by PCIe generation, and the part of it that page-locked copies reach (55.4 of 63 GB/s on an H200).
_LANE_GBPS = {1: 0.25, 2: 0.5, 3: 0.985, 4: 1.969, 5: 3.938, 6: 7.563}
_LINK_SHARE = 0.85
# The part of a data sheet's figure that runs reach: on an H200 0.88 of the link, 0.70 of arithmetic, 0.89 of memory.
_PEAK_SHARE = 0.75
_UNKNOWN_LINK_GBPS = 12.0
_UNKNOWN_DISK_GBPS = 2.0
_LAUNCH_S = 8e-6
# Measured with many models on hosts of H200s: 14 to 32 us.
_MODEL_LAUNCH_S = 21e-6
_FILL_GBPS = 4.0
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class _Card:
    """Dense half-precision matrix products, and device memory: estimates, marked projected wherever used."""

    tflops: float
    hbm_gbps: float
    gather_gbps: float
    """Of the cards of a generation that data centres link directly; PCIe's own where none are."""


# By compute capability, the slower cards of each.
_CARDS = {
    (7, 0): _Card(80, 750, 80),
    (7, 5): _Card(35, 250, 8),
    (8, 0): _Card(200, 1300, 150),
    (8, 6): _Card(60, 500, 12),
    (8, 9): _Card(100, 250, 12),
    (9, 0): _Card(500, 2500, 250),
    (10, 0): _Card(1000, 5000, 400),
    (12, 0): _Card(120, 500, 20),
}
_UNKNOWN_CARD = _Card(30, 250, 8)
_HOST = _Card(0.2, 10, 5)
# Contexts of runs on an H200 measured 0.58 to 0.77 GiB; workspaces are torch's defaults for the generation of the card
# (`_parseChosenWorkspaceSize` in its CUDABlas.cpp), and 1 MiB for products with a bias; an H200 took 33 MiB and 1 KiB.
_CONTEXT_BYTES = 800 * _MIB
_WORKSPACE_BYTES = {True: 34 * _MIB, False: 10 * _MIB}
_COLLECTIVES_BYTES = 1536 * _MIB
_PROCESS_BYTES = 2560 * _MIB


def speeds_of(machine: Machine, rates: Rates, *, dtype: str, world_size: int, disks: Sequence[Disk] = ()) -> Speeds:
    """Rates of each rank while `world_size` run, `disks` read side by side; what was not measured is marked."""
    gpu = machine.gpus[0] if machine.gpus else None
    card = _HOST if gpu is None else _CARDS.get(gpu.capability or (0, 0), _UNKNOWN_CARD)
    gather = (rates.all_gather_gbps or {}).get(world_size, card.gather_gbps)
    wanted = ["matmul_tflops", "hbm_gbps", "launch_s", "model_launch_s", "link_gbps"]
    lock, copy = ("page_lock_gbps", "host_copy_gbps")
    if world_size > 1:
        lock, copy = ("shared_page_lock_gbps", "shared_copy_gbps")
    wanted += [lock, copy, "host_recopy_gbps"]
    wanted += ["disk_gbps"] if disks else []
    wanted += ["all_gather_gbps"] if world_size > 1 else []
    fill = 1 / sum(1 / rates.known.get(name, 2 * _FILL_GBPS) for name in (lock, copy))
    link = _link_gbps(rates, gpu, world_size)
    return Speeds(
        link_gbps=link,
        disk_gbps=sum(rates.of_disk(disk) or _UNKNOWN_DISK_GBPS for disk in disks) or _UNKNOWN_DISK_GBPS,
        gather_gbps=gather,
        tflops=_arithmetic(rates, card, dtype),
        hbm_gbps=rates.hbm_gbps * _reached(rates, "hbm_gbps") if rates.hbm_gbps else card.hbm_gbps,
        launch_s=rates.launch_s or _LAUNCH_S,
        model_launch_s=rates.model_launch_s or _MODEL_LAUNCH_S,
        fill_gbps=fill,
        place_gbps=min(rates.host_recopy_gbps or rates.host_copy_gbps or 2 * _FILL_GBPS, link),
        projected=tuple(name for name in wanted if name not in rates.known or rates.origin(name) != "measured"),
    )


def overhead_of(machine: Machine, rates: Rates, *, world_size: int, gathers: bool) -> Overhead:
    """What each process takes of its GPU beside tensors; nothing without GPUs."""
    if not machine.gpus:
        return Overhead()
    hopper = (machine.gpus[0].capability or (0, 0)) >= (9, 0)
    collectives: tuple[int, TermOrigin] = (0, "counted")
    if gathers:
        known = (rates.nccl_bytes or {}).get(world_size)
        collectives = (_COLLECTIVES_BYTES, "assumed") if known is None else (known, rates.origin("nccl_bytes"))
    return Overhead(
        context=_known(rates, "context_bytes", _CONTEXT_BYTES),
        workspace=_known(rates, "workspace_bytes", _WORKSPACE_BYTES[hopper]),
        collectives=collectives,
        process=_known(rates, "process_bytes", _PROCESS_BYTES),
    )


def _arithmetic(rates: Rates, card: _Card, dtype: str) -> float:
    by_rows: Mapping[int, float] = (rates.matmul_tflops or {}).get(dtype, {})
    if by_rows:
        return max(by_rows.values()) * _reached(rates, "matmul_tflops")
    return card.tflops / (4 if dtype == "float32" else 1)


def _known(rates: Rates, name: str, otherwise: int) -> tuple[int, TermOrigin]:
    value = rates.known.get(name)
    return (otherwise, "assumed") if value is None else (value, rates.origin(name))


def _reached(rates: Rates, name: str) -> float:
    """The part of a rate that runs reach: data sheets print peaks."""
    return _PEAK_SHARE if rates.origin(name) == "data sheet" else 1.0


def _link_gbps(rates: Rates, gpu: Gpu | None, world_size: int) -> float:
    """Of one rank while all pull at once."""
    together = (rates.links_gbps or {}).get(world_size)
    if together is not None:
        return together / world_size * _reached(rates, "links_gbps")
    if rates.link_gbps is not None:
        return rates.link_gbps * _reached(rates, "link_gbps")
    if gpu is None:
        return _HOST.hbm_gbps
    if gpu.pcie_generation is None or gpu.pcie_width is None:
        return _UNKNOWN_LINK_GBPS
    return _LANE_GBPS.get(gpu.pcie_generation, _LANE_GBPS[3]) * gpu.pcie_width * _LINK_SHARE
