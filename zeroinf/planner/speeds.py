"""Determines the rates with which a plan is timed: measured ones, or estimates where nothing was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from zeroinf.hardware.machine import Disk, Gpu, Machine
from zeroinf.hardware.presets import rates_of_gpu
from zeroinf.hardware.rates import Rates
from zeroinf.planner.figures import Card, fitted_figures, unmeasured_figures
from zeroinf.planner.memory import Overhead, TermOrigin
from zeroinf.planner.timing import Speeds


def speeds_of(machine: Machine, rates: Rates, *, dtype: str, world_size: int, disks: Sequence[Disk] = ()) -> Speeds:
    """Rates of each rank while `world_size` run, `disks` read side by side. What was not measured is marked: it is that
    of the same GPU elsewhere, or of one of its compute capability."""
    gpu = machine.gpus[0] if machine.gpus else None
    assumed = unmeasured_figures()
    card = assumed.card(gpu.capability) if gpu else assumed.host
    gather = (rates.all_gather_gbps or {}).get(world_size, card.gather_gbps)
    wanted = ["matmul_tflops", "hbm_gbps", "launch_s", "model_launch_s", "link_gbps"]
    lock, copy = ("page_lock_gbps", "host_copy_gbps")
    if world_size > 1:
        lock, copy = ("shared_page_lock_gbps", "shared_copy_gbps")
    wanted += [lock, copy, "host_recopy_gbps"]
    wanted += ["disk_gbps"] if disks else []
    wanted += ["all_gather_gbps"] if world_size > 1 else []
    fitted = fitted_figures(gpu.capability if gpu else None)
    fill = 1 / sum(1 / rates.known.get(name, 2 * assumed.fill_gbps) for name in (lock, copy))
    link = _link_gbps(rates, gpu, world_size)
    of_gpu = rates
    if gpu is not None and not {"matmul_tflops", "hbm_gbps"} <= set(rates.known):
        of_gpu = rates_of_gpu(gpu.name).updated(rates)
    return Speeds(
        link_gbps=link,
        disk_gbps=sum(rates.of_disk(disk) or assumed.disk_gbps for disk in disks) or assumed.disk_gbps,
        disk_reads_per_s=min((rates.disk_reads_per_s or {}).values(), default=assumed.disk_reads_per_s),
        gather_gbps=gather,
        tflops=_arithmetic(of_gpu, card, dtype),
        hbm_gbps=of_gpu.hbm_gbps * _reached(of_gpu, "hbm_gbps") if of_gpu.hbm_gbps else card.hbm_gbps,
        launch_s=rates.launch_s or assumed.launch_s,
        model_launch_s=rates.model_launch_s or assumed.model_launch_s,
        triton_launch_s=rates.triton_launch_s or fitted.passes.triton_launch_s,
        fill_gbps=fill,
        place_gbps=min(rates.host_recopy_gbps or rates.host_copy_gbps or 2 * assumed.fill_gbps, link),
        host_read_gbps=(rates.host_read_gbps or assumed.host_read_gbps) / world_size,
        host_read_link_cost=_link_cost(rates),
        link_read_cost=_read_cost(rates),
        reads_host=rates.host_read_gbps is not None,
        first_pass_s=fitted.passes.first_pass_s if gpu else 0.0,
        first_layer_s=fitted.passes.first_layer_s if gpu else 0.0,
        fitted=fitted,
        projected=tuple(name for name in wanted if name not in rates.known or rates.origin(name) != "measured"),
    )


def overhead_of(machine: Machine, rates: Rates, *, world_size: int, gathers: bool) -> Overhead:
    """Memory that each process takes of its GPU beside tensors; none without GPUs."""
    if not machine.gpus:
        return Overhead()
    assumed, capability = unmeasured_figures(), machine.gpus[0].capability
    hopper = (capability or (0, 0)) >= (9, 0)
    workspace = assumed.hopper_workspace_bytes if hopper else assumed.workspace_bytes
    collectives: tuple[int, TermOrigin] = (0, "counted")
    if gathers:
        known = (rates.nccl_bytes or {}).get(world_size)
        collectives = (assumed.collectives_bytes, "assumed") if known is None else (known, rates.origin("nccl_bytes"))
    return Overhead(
        context=_known(rates, "context_bytes", assumed.context_bytes),
        workspace=_known(rates, "workspace_bytes", workspace),
        collectives=collectives,
        process=_known(rates, "process_bytes", assumed.process_bytes),
        uncounted=fitted_figures(capability).memory,
    )


def _arithmetic(rates: Rates, card: Card, dtype: str) -> float:
    by_rows: Mapping[int, float] = (rates.matmul_tflops or {}).get(dtype, {})
    if by_rows:
        return max(by_rows.values()) * _reached(rates, "matmul_tflops")
    return card.tflops / (4 if dtype == "float32" else 1)


def _known(rates: Rates, name: str, otherwise: int) -> tuple[int, TermOrigin]:
    value = rates.known.get(name)
    return (otherwise, "assumed") if value is None else (value, rates.origin(name))


def _reached(rates: Rates, name: str) -> float:
    """The part of a rate that runs reach: data sheets print peaks."""
    return unmeasured_figures().data_sheet_share if rates.origin(name) == "data sheet" else 1.0


def _link_cost(rates: Rates) -> float:
    """Bytes that processors read less of host memory for each byte that a link takes from there; all of them where
    that was not measured."""
    alone, beside, link = rates.host_read_gbps, rates.host_read_beside_link_gbps, rates.link_gbps
    return 1.0 if alone is None or beside is None or link is None else min(1.0, max(0.0, (alone - beside) / link))


def _read_cost(rates: Rates) -> float:
    """The part of its rate that a link loses while processors read host memory; none where that was not measured."""
    beside, link = rates.link_beside_read_gbps, rates.link_gbps
    return 0.0 if beside is None or link is None else max(0.0, 1.0 - beside / link)


def _link_gbps(rates: Rates, gpu: Gpu | None, world_size: int) -> float:
    """The rate of one rank's link while all pull at once."""
    together = (rates.links_gbps or {}).get(world_size)
    if together is not None:
        return together / world_size * _reached(rates, "links_gbps")
    if rates.link_gbps is not None:
        return rates.link_gbps * _reached(rates, "link_gbps")
    assumed = unmeasured_figures()
    if gpu is None:
        return assumed.host.hbm_gbps
    if gpu.pcie_generation is None or gpu.pcie_width is None:
        return assumed.link_gbps
    return assumed.lane_gbps.get(gpu.pcie_generation, assumed.lane_gbps[3]) * gpu.pcie_width * assumed.link_share
