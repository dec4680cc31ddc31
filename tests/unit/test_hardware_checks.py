"""The doctor's findings, on machines that are not here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from fake_aio_op import WORKING

from zeroinf.errors import EnvironmentProblem
from zeroinf.hardware.aio_op import AioOp
from zeroinf.hardware.checks import Check, Requirements, check_machine, require
from zeroinf.hardware.machine import Disk, Gpu, Machine, Memory
from zeroinf.hardware.snapshot import PACKAGES
from zeroinf.sizes import gib

GIB = 1 << 30

DISK = Disk(
    path=Path("/nvme"),
    exists=True,
    writable=True,
    free_bytes=900 * GIB,
    total_bytes=1000 * GIB,
    filesystem="xfs",
    o_direct=True,
)
GPU = Gpu(
    index=0,
    name="Fake 24",
    total_bytes=24 * GIB,
    free_bytes=24 * GIB,
    other_bytes=0,
    pcie_generation=4,
    pcie_width=16,
    capability=(8, 9),
)
MEMORY = Memory(
    total_bytes=256 * GIB,
    available_bytes=200 * GIB,
    cgroup_limit_bytes=None,
    swap_bytes=0,
    shared_memory_bytes=8 * GIB,
    memlock_bytes=None,
    numa_nodes=2,
)
MACHINE = Machine(
    gpus=(GPU,), memory=MEMORY, disks=(DISK,), cores=32, versions=dict.fromkeys(("python", *PACKAGES), "9.9")
)
NVME = Requirements(offload="nvme", engine="zero")


def troubles(machine: Machine, op: AioOp = WORKING, asked: Requirements = NVME) -> list[Check]:
    return [check for check in check_machine(machine, op, asked) if check.status != "ok"]


def only_trouble(machine: Machine, op: AioOp = WORKING, asked: Requirements = NVME) -> Check:
    (check,) = troubles(machine, op, asked)
    assert check.advice, "whoever says that something is wrong says what to do"
    return check


def test_good_machine_has_no_trouble_and_satisfies() -> None:
    assert troubles(MACHINE) == []
    require(check_machine(MACHINE, WORKING, NVME))


def test_small_memlock_fails_for_deepspeeds_disk_io_and_warns_otherwise() -> None:
    small = replace(MACHINE, memory=replace(MEMORY, memlock_bytes=8 << 20))
    check = only_trouble(small)
    assert (check.name, check.status) == ("memlock", "fail")
    assert "8.0 MiB" in check.value
    for asked in (Requirements(offload="cpu", engine="zero"), Requirements(offload="nvme")):
        assert only_trouble(small, asked=asked).status == "warn"
    assert troubles(replace(MACHINE, memory=replace(MEMORY, memlock_bytes=4 * GIB))) == []


def test_full_disk_fails_and_says_how_much_is_left() -> None:
    check = only_trouble(replace(MACHINE, disks=(replace(DISK, free_bytes=100 << 20),)))
    assert (check.name, check.status) == ("NVMe /nvme", "fail")
    assert "full: 100.0 MiB free of 1000.0 GiB" in check.value


@pytest.mark.parametrize(
    ("change", "status", "value"),
    [
        ({"exists": False}, "fail", "no such folder"),
        ({"writable": False}, "fail", "not writable"),
        ({"o_direct": False}, "warn", "no O_DIRECT"),
        ({"filesystem": "tmpfs"}, "warn", "tmpfs"),
    ],
)
def test_each_fault_of_a_folder_is_told(change: dict[str, object], status: str, value: str) -> None:
    check = only_trouble(replace(MACHINE, disks=(replace(DISK, **change),)))  # type: ignore[arg-type]
    assert check.status == status
    assert value in check.value


def test_too_few_gpus_fail_only_when_a_number_was_asked_for() -> None:
    check = only_trouble(MACHINE, asked=Requirements(num_gpus=8))
    assert (check.name, check.status, check.value) == ("GPUs", "fail", "8 asked for, 1 visible")
    bare = replace(MACHINE, gpus=())
    assert only_trouble(bare).status == "warn"
    assert only_trouble(bare, asked=Requirements(num_gpus=1)).status == "fail"


def test_gpu_that_others_use_warns_with_sizes_and_link() -> None:
    busy = replace(GPU, free_bytes=10 * GIB, other_bytes=14 * GIB)
    check = only_trouble(replace(MACHINE, gpus=(busy,)))
    assert (check.name, check.status) == ("GPU 0", "warn")
    assert check.value == "Fake 24, 24.0 GiB, 10.0 GiB free, 14.0 GiB held by others, PCIe 4 x16"


def test_small_shared_memory_warns_for_several_gpus_only() -> None:
    docker = replace(MEMORY, shared_memory_bytes=64 << 20)
    assert troubles(replace(MACHINE, memory=docker)) == []
    check = only_trouble(replace(MACHINE, memory=docker, gpus=(GPU, replace(GPU, index=1))))
    assert (check.name, check.status) == ("shared memory", "warn")


def test_cgroup_limit_is_shown() -> None:
    limited = replace(MACHINE, memory=replace(MEMORY, cgroup_limit_bytes=64 * GIB))
    values = {check.name: check.value for check in check_machine(limited, WORKING, NVME)}
    assert "cgroup limit 64.0 GiB" in values["host memory"]


def test_missing_package_fails_always() -> None:
    versions = {name: version for name, version in MACHINE.versions.items() if name != "greenlet"}
    check = only_trouble(replace(MACHINE, versions=versions), asked=Requirements())
    assert (check.name, check.status) == ("greenlet", "fail")


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"header": None}, "libaio"),
        ({"compiler": None}, "compiler"),
        ({"ninja": None}, "ninja"),
        ({"nvcc": None}, "nvcc"),
        ({"unreadable_architectures": ("9.0a",)}, "TORCH_CUDA_ARCH_LIST"),
        ({"lock": Path("ext/async_io/lock"), "lock_is_stale": True}, "build lock"),
    ],
)
def test_op_that_cannot_be_built_fails_for_nvme_and_warns_otherwise(change: dict[str, object], name: str) -> None:
    op = replace(WORKING, **change)  # type: ignore[arg-type]
    check = only_trouble(MACHINE, op)
    assert (check.name, check.status) == (name, "fail")
    assert only_trouble(MACHINE, op, Requirements()).status == "warn"


def test_unreadable_architectures_warn_where_no_gpu_needs_them() -> None:
    op = replace(WORKING, with_cuda=False, nvcc=None, unreadable_architectures=("9.0a",))
    check = only_trouble(MACHINE, op)
    assert (check.name, check.status) == ("TORCH_CUDA_ARCH_LIST", "warn")


def test_build_at_work_warns_but_does_not_fail() -> None:
    check = only_trouble(MACHINE, replace(WORKING, lock=Path("ext/async_io/lock")))
    assert (check.name, check.status) == ("build lock", "warn")
    assert "ext/async_io/lock" in check.value


def test_first_compile_is_announced_when_nvme_is_asked_for() -> None:
    op = replace(WORKING, built=False)
    check = only_trouble(MACHINE, op)
    assert (check.name, check.status) == ("async_io op", "warn")
    assert "minutes" in (check.advice or "")
    assert troubles(MACHINE, op, Requirements()) == []


def test_op_installed_with_deepspeed_is_enough() -> None:
    op = replace(WORKING, built=False, prebuilt=True, header=None, compiler=None)
    assert troubles(MACHINE, op) == []


def test_require_names_every_failed_check_and_passes_the_first_advice_on() -> None:
    broken = replace(MACHINE, disks=(replace(DISK, exists=False),))
    with pytest.raises(EnvironmentProblem) as raised:
        require(check_machine(broken, replace(WORKING, ninja=None), NVME))
    assert "ninja (not found on PATH)" in raised.value.message
    assert "NVMe /nvme (no such folder)" in raised.value.message
    assert raised.value.hint is not None
    assert "pip install ninja" in raised.value.hint
    assert raised.value.exit_code == 4


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0.0 GiB"), (64 << 10, "64.0 KiB"), (8 << 20, "8.0 MiB"), (GIB // 2, "0.50 GiB"), (24 * GIB, "24.0 GiB")],
)
def test_sizes_print_in_gib_and_never_as_a_false_zero(size: int, text: str) -> None:
    assert gib(size) == text
