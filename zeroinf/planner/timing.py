"""How long a plan takes: the roofline of links, disk, arithmetic, GPU memory and kernel launches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from zeroinf.model.anatomy import Anatomy
from zeroinf.planner.choice import Choice
from zeroinf.planner.memory import pieces
from zeroinf.planner.workload import Kernel, Kernels, Step, Workload

Resource = Literal["link", "disk", "all-gather", "arithmetic", "GPU memory", "kernel launches"]

# The part of its links that DeepSpeed's engine reaches, by the number of GPUs (docs/benchmarks.md).
_ZERO_SHARE = {1: 0.85, 2: 0.49}
_ZERO_SHARE_OF_MORE = 0.36

# What the kernels of real models reach of the measured rates, and what launching one through a model's Python costs
# beside a bare launch: fitted to 53 runs of five architectures on an H200 (docs/benchmarks.md).
_SHARES = (0.95, 0.62)  # of arithmetic, of memory
_MASKED_ATTENTION_SHARES = (0.17, 0.23)
_HOST_SHARE = 2.3
_STEP_S = 0.5e-3
_SHORTEST_KERNEL_S = 2e-6

# Making codes of weights in a checkpoint, GB/s of the weights: eight threads, of which each made 1.1 to 1.5 on a core
# of its own; with fewer cores it takes longer.
_ENCODE_GBPS = 8.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Speeds:
    """The rates that a plan is timed with: GB/s (10^9 bytes), 10^12 operations a second, seconds.

    `link_gbps` is that of one rank while all pull at once; `projected` names those that nobody measured.
    """

    link_gbps: float
    disk_gbps: float
    gather_gbps: float
    """An all-gather over the ranks: bytes of the whole result a second."""
    tflops: float
    hbm_gbps: float
    launch_s: float
    fill_gbps: float
    """Filling host memory from the page cache, and page-locking it."""
    place_gbps: float
    """From the page cache through a stage in host memory onto the GPU."""
    projected: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """A plan in seconds. A pass is one walk over all blocks: a prefill or a decode step of one micro-batch."""

    load_s: float
    prefill_s: float
    decode_s: float
    tokens_per_second: float
    """All ranks together, prefill included."""
    streamed_bytes: int
    """That cross one rank's link in a pass."""
    binds: Resource
    """What a decode step waits for."""


def time_plan(
    anatomy: Anatomy, choice: Choice, workload: Workload, speeds: Speeds, world_size: int, requests: int | None
) -> Timing:
    """The time of `requests` requests (None: as many as fill every micro-batch) on `world_size` ranks."""
    parts = world_size if choice.fetch == "partitioned" or choice.engine == "zero" else 1
    sizes = sorted(pieces(anatomy, choice.wire), reverse=True)
    streams = choice.engine == "zero" or choice.resident_blocks < len(sizes)
    passing = sum(sizes[choice.resident_blocks :]) if choice.engine == "stream" else sum(sizes)
    streamed = 0 if choice.offload == "none" else passing // parts
    share = _ZERO_SHARE.get(world_size, _ZERO_SHARE_OF_MORE) if choice.engine == "zero" else 1.0
    from_disk = sum(sizes[: choice.nvme_blocks]) * world_size // parts
    waits: dict[Resource, float] = {
        "link": streamed / speeds.link_gbps / 1e9 / share,
        "disk": from_disk / speeds.disk_gbps / 1e9,
        "all-gather": passing / speeds.gather_gbps / 1e9 if streams and parts > 1 else 0.0,
    }
    expansion = _expansion(anatomy, choice)
    prefill, _ = _step(_with(workload.prefill, expansion), waits, speeds)
    first, _ = _step(_with(workload.first_decode, expansion), waits, speeds)
    last, binds = _step(_with(workload.last_decode, expansion), waits, speeds)
    decode = (first + last) / 2
    batch_s = prefill + (workload.new_tokens - 1) * decode
    batches = 1 if requests is None else -(-requests // (workload.rows * world_size))
    rows = workload.rows * world_size if requests is None else requests
    return Timing(
        load_s=_load_s(anatomy, choice, sizes, speeds),
        prefill_s=prefill,
        decode_s=decode,
        tokens_per_second=rows * workload.new_tokens / (batches * batch_s),
        streamed_bytes=streamed,
        binds=binds,
    )


def _expansion(anatomy: Anatomy, choice: Choice) -> Kernels:
    """What turns codes into weights again in a pass: a kernel and a copy for each block."""
    if choice.wire == "model":
        return Kernels(1.0, ())
    both = zip(pieces(anatomy), pieces(anatomy, choice.wire), strict=True)
    return Kernels(1.0, tuple(kernel for full, coded in both for kernel in (Kernel(0, full + coded), Kernel(0, 0))))


def _with(step: Step, more: Kernels) -> Step:
    return replace(step, kernels=(*step.kernels, more))


def _load_s(anatomy: Anatomy, choice: Choice, sizes: Sequence[int], speeds: Speeds) -> float:
    """Seconds until the blocks (`sizes`, in bytes) are where they rest; a store that is not there yet takes longer."""
    resident = sum(sizes[: choice.resident_blocks]) if choice.engine == "stream" else 0
    on_disk = sum(sizes[: choice.nvme_blocks])
    from_store = resident / speeds.disk_gbps if choice.nvme_blocks else resident / speeds.place_gbps
    encoded = 0 if choice.wire == "model" or choice.nvme_blocks else sum(pieces(anatomy))
    return ((sum(sizes) - resident - on_disk) / speeds.fill_gbps + from_store + encoded / _ENCODE_GBPS) / 1e9


def _step(step: Step, waits: dict[Resource, float], speeds: Speeds) -> tuple[float, Resource]:
    """Seconds of a step and what they are spent on: streams, host and GPU work beside each other."""
    on_gpu = _gpu_times(step, speeds)
    launches = sum(group.times * len(group.kernels) for group in step.kernels)
    times: dict[Resource, float] = {
        **waits,
        "kernel launches": launches * speeds.launch_s * _HOST_SHARE + _STEP_S,
        max(on_gpu, key=lambda resource: on_gpu[resource]): sum(on_gpu.values()),
    }
    slowest = max(times, key=lambda resource: times[resource])
    return times[slowest], slowest


def _gpu_times(step: Step, speeds: Speeds) -> dict[Resource, float]:
    """Seconds of a step's kernels by what each of them is bound by."""
    times: dict[Resource, float] = {"arithmetic": 0.0, "GPU memory": 0.0}
    for group in step.kernels:
        for kernel in group.kernels:
            shares = _MASKED_ATTENTION_SHARES if kernel.is_masked_attention else _SHARES
            arithmetic = kernel.flops / speeds.tflops / 1e12 / shares[0]
            memory = max(kernel.nbytes / speeds.hbm_gbps / 1e9 / shares[1], _SHORTEST_KERNEL_S)
            times["arithmetic" if arithmetic > memory else "GPU memory"] += group.times * max(arithmetic, memory)
    return times
