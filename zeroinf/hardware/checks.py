"""The checks of `zeroinf doctor`, computed from a snapshot of the machine.

A check fails if the machine cannot do something that the user asked for. It warns about what may matter in other runs.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from zeroinf.errors import EnvironmentProblem
from zeroinf.hardware.aio_op import AioOp, Problem
from zeroinf.hardware.machine import Disk, Gpu, Machine, Memory
from zeroinf.hardware.profile import Profile
from zeroinf.hardware.snapshot import PACKAGES
from zeroinf.sizes import gib

CheckStatus = Literal["ok", "warn", "fail"]

GIB = 1 << 30

# DeepSpeed's pool for NVMe parameters by default: 5 buffers of 1e8 16-bit elements (its offload_config.py).
DEFAULT_POOL_BYTES = 5 * 100_000_000 * 2

# What NCCL's troubleshooting page asks of containers (--shm-size=1g); Docker's own default is 64 MiB.
NCCL_SHARED_MEMORY_BYTES = GIB

# A desktop or an idle CUDA context takes less than this of a GPU; another job takes more.
NOTABLE_GPU_BYTES = GIB

# Less room than this holds no model worth offloading.
SMALLEST_STORE_BYTES = GIB

MEMORY_FILESYSTEMS = frozenset({"tmpfs", "ramfs"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """The result of one check: `value` is what was found, `advice` what to do if the status is not ok."""

    name: str
    status: CheckStatus
    value: str
    advice: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Requirements:
    """The user's requirements; every disk of the snapshot counts as required."""

    offload: Literal["none", "cpu", "nvme"] = "none"
    num_gpus: int | None = None
    engine: Literal["stream", "zero"] = "stream"

    @property
    def disk_io(self) -> bool:
        """DeepSpeed's own disk I/O; the stream engine needs none of it."""
        return self.offload == "nvme" and self.engine == "zero"


def check_machine(machine: Machine, op: AioOp, asked: Requirements) -> list[Check]:
    """Every check, in the order a reader would want: software, GPUs, memory, NVMe."""
    return [
        *check_versions(machine.versions),
        *check_gpus(machine.gpus, asked.num_gpus),
        *check_memory(machine, several_gpus=(asked.num_gpus or len(machine.gpus)) > 1),
        check_memlock(machine.memory, asked=asked.disk_io),
        *check_aio_op(op, asked=asked.disk_io),
        *(check_disk(disk) for disk in machine.disks),
    ]


def require(checks: Sequence[Check]) -> None:
    """Raise EnvironmentProblem, with the names of the failed checks and the first advice, unless none failed."""
    failed = [check for check in checks if check.status == "fail"]
    if failed:
        names = ", ".join(f"{check.name} ({check.value})" for check in failed)
        raise EnvironmentProblem(f"this machine cannot do what was asked: {names}", hint=failed[0].advice)


def check_versions(versions: dict[str, str]) -> list[Check]:
    """Python and the packages that zeroinf needs; a missing one fails, since nothing runs without it."""
    return [
        Check(name=name, status="ok", value=versions[name])
        if name in versions
        else Check(name=name, status="fail", value="not installed", advice=f"pip install {name}")
        for name in ("python", *PACKAGES)
    ]


def check_gpus(gpus: Sequence[Gpu], num_gpus: int | None) -> list[Check]:
    """Check the number of visible GPUs against `num_gpus` (None: any number will do), then each GPU."""
    return [_count_gpus(len(gpus), num_gpus), *(_check_gpu(gpu) for gpu in gpus)]


def _count_gpus(visible: int, num_gpus: int | None) -> Check:
    if num_gpus is not None and visible < num_gpus:
        advice = "look at nvidia-smi and CUDA_VISIBLE_DEVICES, or lower --num-gpus"
        return Check(name="GPUs", status="fail", value=f"{num_gpus} asked for, {visible} visible", advice=advice)
    if visible == 0:
        advice = "models will run on the CPU; if there is a GPU, look at nvidia-smi and CUDA_VISIBLE_DEVICES"
        return Check(name="GPUs", status="warn", value="none visible", advice=advice)
    return Check(name="GPUs", status="ok", value=f"{visible} visible")


def _check_gpu(gpu: Gpu) -> Check:
    memory = f"{gib(gpu.total_bytes)}, {gib(gpu.free_bytes)} free, {gib(gpu.other_bytes)} held by others"
    link = f"PCIe {gpu.pcie_generation or '?'} x{gpu.pcie_width or '?'}"
    value = f"{gpu.name}, {memory}, {link}"
    if gpu.other_bytes < NOTABLE_GPU_BYTES:
        return Check(name=f"GPU {gpu.index}", status="ok", value=value)
    advice = "other processes hold memory of this GPU (nvidia-smi names them); stop them or plan with less"
    return Check(name=f"GPU {gpu.index}", status="warn", value=value, advice=advice)


def check_memory(machine: Machine, *, several_gpus: bool) -> list[Check]:
    """Cores, host memory, swap and shared memory; the last must be large where NCCL joins several GPUs."""
    memory = machine.memory
    limit = memory.cgroup_limit_bytes
    limited = "no cgroup limit" if limit is None else f"cgroup limit {gib(limit)}"
    shared_is_small = several_gpus and memory.shared_memory_bytes < NCCL_SHARED_MEMORY_BYTES
    return [
        Check(name="cores", status="ok", value=f"{machine.cores}, {memory.numa_nodes} NUMA node(s)"),
        Check(
            name="host memory",
            status="ok",
            value=f"{gib(memory.total_bytes)}, {gib(memory.available_bytes)} available, {limited}",
        ),
        Check(name="swap", status="ok", value=gib(memory.swap_bytes)),
        Check(
            name="shared memory",
            status="warn" if shared_is_small else "ok",
            value=f"{gib(memory.shared_memory_bytes)} free in /dev/shm",
            advice="NCCL wants 1 GiB: start the container with --shm-size=1g" if shared_is_small else None,
        ),
    ]


def check_memlock(memory: Memory, *, asked: bool, needed_bytes: int = DEFAULT_POOL_BYTES) -> Check:
    """Whether a process may lock `needed_bytes`: DeepSpeed locks its NVMe pool, and aborts (SIGABRT) if it may not."""
    limit = memory.memlock_bytes
    if limit is None:
        return Check(name="memlock", status="ok", value="unlimited")
    if limit >= needed_bytes:
        return Check(name="memlock", status="ok", value=gib(limit))
    return Check(
        name="memlock",
        status="fail" if asked else "warn",
        value=f"{gib(limit)}, less than the {gib(needed_bytes)} that --engine zero --offload nvme locks",
        advice="ulimit -l unlimited, or start the container with --ulimit memlock=-1 or --cap-add IPC_LOCK",
    )


def check_profile(profile: Profile, now: datetime) -> Check:
    """Whether this machine's rates were measured, and how long ago."""
    advice = "zeroinf doctor --measure, with each --nvme-path that weights may be kept in"
    if profile.trouble is not None:
        value = f"{profile.path} {profile.trouble}"
        return Check(name="rates", status="warn", value=f"not used: {value}", advice=advice)
    if profile.measured_at is None:
        return Check(name="rates", status="warn", value="not measured on this machine", advice=advice)
    if profile.rates.host_copy_gbps is None:  # which `zeroinf doctor` measures everywhere
        known = ", ".join(sorted(profile.rates.known))
        return Check(name="rates", status="warn", value=f"only what a run has measured: {known}", advice=advice)
    days = (now - profile.measured_at).days
    age = {0: "today", 1: "yesterday"}.get(days, f"{days} days ago")
    return Check(name="rates", status="ok", value=f"measured {age} ({profile.measured_at:%Y-%m-%d %H:%M} UTC)")


def check_aio_op(op: AioOp, *, asked: bool) -> list[Check]:
    """Check each requirement of DeepSpeed's `async_io` op; problems fail if it was `asked` for and warn otherwise."""
    problems = {problem.name: problem for problem in op.problems()}
    return [
        _from_problem(problems[name], fatal=asked) if name in problems else Check(name=name, status="ok", value=value)
        for name, value in _aio_pieces(op)
    ] + list(_aio_warnings(op, asked=asked))


def _aio_pieces(op: AioOp) -> Iterator[tuple[str, str]]:
    """The name of each piece, as `AioOp.problems` has it, and what to print if there is no problem with it."""
    if op.prebuilt:
        return
    yield "libaio", str(op.library)
    yield "compiler", str(op.compiler)
    yield "ninja", str(op.ninja)
    if op.with_cuda:
        yield "nvcc", str(op.nvcc)
        yield "TORCH_CUDA_ARCH_LIST", "readable or not set"
    if op.lock is None or op.lock_is_stale:
        yield "build lock", "none"


def _aio_warnings(op: AioOp, *, asked: bool) -> Iterator[Check]:
    """Warnings about the op that cost time or matter on other machines, but stop nothing here."""
    if op.lock is not None and not op.lock_is_stale:
        yield Check(
            name="build lock",
            status="warn",
            value=f"held by a build at work: {op.lock}",
            advice="a run waits for its end",
        )
    if op.unreadable_architectures and not op.with_cuda:
        yield _from_problem(op.architecture_problem(), fatal=False)
    if op.usable_at_once:
        where = "installed with DeepSpeed" if op.prebuilt else f"built in {op.folder}"
        yield Check(name="async_io op", status="ok", value=where)
    else:
        yield Check(
            name="async_io op",
            status="warn" if asked else "ok",
            value="not built yet",
            advice="the first run with --engine zero --offload nvme compiles it, which takes minutes"
            if asked
            else None,
        )


def _from_problem(problem: Problem, *, fatal: bool) -> Check:
    return Check(name=problem.name, status="fail" if fatal else "warn", value=problem.message, advice=problem.hint)


def check_disk(disk: Disk, *, needed_bytes: int = SMALLEST_STORE_BYTES) -> Check:
    """Whether the folder can hold `needed_bytes` of weights and serve them at the disk's speed."""

    def finding(status: CheckStatus, value: str, advice: str | None) -> Check:
        return Check(name=f"NVMe {disk.path}", status=status, value=value, advice=advice)

    if not disk.exists:
        return finding("fail", "no such folder", f"mkdir -p {shlex.quote(str(disk.path))}, or name another --nvme-path")
    if not disk.writable:
        return finding("fail", "not writable", "give this user the right to write there, or name another --nvme-path")
    room = f"{gib(disk.free_bytes)} free of {gib(disk.total_bytes)}, {disk.filesystem or 'unknown file system'}"
    if disk.free_bytes < needed_bytes:
        return finding("fail", f"full: {room}", f"free at least {gib(needed_bytes)} there, or name another --nvme-path")
    if disk.filesystem in MEMORY_FILESYSTEMS:
        return finding(
            "warn", room, "this folder lives in host memory, not on a disk: --offload cpu does the same, faster"
        )
    if not disk.o_direct:
        advice = "reads go through the page cache: slower, and they take host memory; use a local ext4 or xfs folder"
        return finding("warn", f"{room}, no O_DIRECT", advice)
    return finding("ok", f"{room}, O_DIRECT", None)
