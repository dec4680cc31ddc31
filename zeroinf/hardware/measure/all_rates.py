"""Runs all measurements of a machine's rates, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from zeroinf.compat.threads import few_threads
from zeroinf.errors import ZeroinfError
from zeroinf.hardware.machine import Disk, Gpu, Machine
from zeroinf.hardware.measure.all_gather_rate import measure_all_gather
from zeroinf.hardware.measure.disk_rate import measure_disk, measure_page_reads
from zeroinf.hardware.measure.footprint import measure_footprint
from zeroinf.hardware.measure.gpu_rates import (
    measure_hbm,
    measure_launch,
    measure_matmul,
    measure_model_launch,
    measure_triton_launch,
)
from zeroinf.hardware.measure.host_copy_rate import measure_host_copy
from zeroinf.hardware.measure.host_read_rate import measure_host_read, measure_read_beside_link
from zeroinf.hardware.measure.link_rates import measure_links, measure_page_lock
from zeroinf.hardware.rates import Rates

_Measurement = Callable[[], dict[str, Any]]


def measure_machine(machine: Machine, say: Callable[[str], None]) -> Rates:
    """Every rate of `machine`, which must be this one: its GPUs, host memory, and the disks it names.

    `say` gets a line before each measurement, and one after it if it failed: that rate stays unknown, the others
    are measured. About a minute with one GPU, and up to 20 s more for each disk.
    """
    rates = Rates()
    if machine.gpus and not _torch_has_cuda():
        say("not measured: GPUs: this torch cannot use them")
        machine = replace(machine, gpus=())
    for name, measure in _measurements(machine):
        say(f"measuring {name} ...")
        try:
            rates = rates.updated(Rates.of("measured", **measure()))
        except (ZeroinfError, RuntimeError, OSError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            say(f"not measured: {name}: {reason}")
    return rates


def _measurements(machine: Machine) -> Iterator[tuple[str, _Measurement]]:
    yield "host memory", lambda: dict(zip(("host_copy_gbps", "host_recopy_gbps"), measure_host_copy(), strict=True))
    yield "reads of host memory", lambda: {"host_read_gbps": measure_host_read()}
    if machine.gpus:
        yield from _gpu_measurements(machine.gpus)
    for disk in machine.disks:
        yield f"disk of {disk.path}", partial(_disk, disk)


def _gpu_measurements(gpus: tuple[Gpu, ...]) -> Iterator[tuple[str, _Measurement]]:
    yield "what a process takes of a GPU", lambda: dict(measure_footprint(gpus[0]))
    yield "links", lambda: _links(gpus)
    yield "reads beside a link", partial(_beside_link, gpus[0])
    yield "page-locking", lambda: {"page_lock_gbps": measure_page_lock()}
    yield "GPU memory", lambda: {"hbm_gbps": measure_hbm()}
    yield "matrix products", lambda: {"matmul_tflops": {dtype: measure_matmul(dtype) for dtype in _dtypes()}}
    yield "kernel launches", _as_in_runs(lambda: {"launch_s": measure_launch()})
    yield "a model's kernel launches", _as_in_runs(lambda: {"model_launch_s": measure_model_launch()})
    yield "launches of Triton's kernels", _as_in_runs(lambda: {"triton_launch_s": measure_triton_launch()})
    if len(gpus) > 1:
        yield "memory that ranks share", _shared_memory
        yield "all-gather", lambda: _all_gather(gpus)


def _as_in_runs(measure: _Measurement) -> _Measurement:
    """`measure` with as few threads of torch as runs have, whose members would take time from launches."""

    def measured() -> dict[str, Any]:
        with few_threads():
            return measure()

    return measured


def _shared_memory() -> dict[str, Any]:
    copied, _ = measure_host_copy(shared=True)
    return {"shared_copy_gbps": copied, "shared_page_lock_gbps": measure_page_lock(shared=True)}


def _links(gpus: tuple[Gpu, ...]) -> dict[str, Any]:
    alone = min(measure_links([gpu.index]) for gpu in gpus)
    together = {n: measure_links([gpu.index for gpu in gpus[:n]]) for n in gpu_counts(len(gpus)) if n > 1}
    return {"link_gbps": alone, "links_gbps": {1: alone, **together}}


def _all_gather(gpus: tuple[Gpu, ...]) -> dict[str, Any]:
    found = {n: measure_all_gather(gpus[:n]) for n in gpu_counts(len(gpus)) if n > 1}
    return {
        "all_gather_gbps": {n: gbps for n, (gbps, _) in found.items()},
        "nccl_bytes": {n: nccl_bytes for n, (_, nccl_bytes) in found.items()},
    }


def _beside_link(gpu: Gpu) -> dict[str, Any]:
    found = measure_read_beside_link(gpu.index)
    return {"host_read_beside_link_gbps": found.read_gbps, "link_beside_read_gbps": found.link_gbps}


def _disk(disk: Disk) -> dict[str, Any]:
    by_requests = measure_disk(disk.path)
    return {
        "disk_gbps": {disk.volume: max(by_requests.values())},
        "disk_gbps_by_requests": {disk.volume: by_requests},
        "disk_reads_per_s": {disk.volume: measure_page_reads(disk.path)},
    }


def gpu_counts(number: int) -> list[int]:
    """1, 2, 4, ... up to `number`, and `number` itself."""
    return [n for n in (1 << power for power in range(number.bit_length())) if n < number] + [number]


def _torch_has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _dtypes() -> list[str]:
    import torch

    native = torch.cuda.is_bf16_supported(including_emulation=False)
    return ["bfloat16"] * native + ["float16", "float32"]
