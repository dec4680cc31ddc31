"""A machine with what the user says of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zeroinf.errors import UsageError
from zeroinf.hardware.machine import Disk, Gpu, Machine, Memory
from zeroinf.hardware.override import override
from zeroinf.hardware.rates import Rates
from zeroinf.sizes import Share

GIB = 1 << 30

sizes = st.integers(1, 4096).map(lambda n: n * GIB)
counts = st.integers(1, 16)
speeds = st.floats(0.1, 1000)


@st.composite
def machines(draw: st.DrawFn, *, least_gpus: int = 0, least_disks: int = 0) -> Machine:
    def size_and_free() -> tuple[int, int]:
        total = draw(sizes)
        return total, draw(st.integers(0, total))

    gpus = []
    for index in range(draw(st.integers(least_gpus, 4))):
        total, free = size_and_free()
        gpus.append(Gpu(
            index=index, name=f"GPU {index}", total_bytes=total, free_bytes=free, other_bytes=total - free,
            pcie_generation=4, pcie_width=16, capability=(8, 0), uuid=f"GPU-{index}",
        ))  # fmt: skip
    disks = []
    for index in range(draw(st.integers(least_disks, 3))):
        total, free = size_and_free()
        disks.append(Disk(
            path=Path(f"/disk{index}"), exists=True, writable=True, free_bytes=free, total_bytes=total,
            filesystem="xfs", o_direct=True,
        ))  # fmt: skip
    total, free = size_and_free()
    memory = Memory(
        total_bytes=total, available_bytes=free, cgroup_limit_bytes=draw(st.none() | st.just(total)), swap_bytes=0,
        shared_memory_bytes=0, memlock_bytes=None, numa_nodes=1,
    )  # fmt: skip
    return Machine(gpus=tuple(gpus), memory=memory, disks=tuple(disks), cores=8)


MEASURED = Rates.of(
    "measured", link_gbps=25.0, links_gbps={1: 25.0, 2: 40.0}, hbm_gbps=900.0, disk_gbps={"/disk0": 2.0, "/other": 1.0}
)


@given(machines(least_gpus=1), st.floats(0.01, 1))
def test_a_share_caps_each_gpu_by_its_own_size(machine: Machine, part: float) -> None:
    gpus = override(machine, MEASURED, gpu_memory=Share(part))[0].gpus
    for before, after in zip(machine.gpus, gpus, strict=True):
        assert after.total_bytes == int(part * before.total_bytes)
        assert after.free_bytes == min(before.free_bytes, after.total_bytes)


def test_a_share_of_no_gpu_is_refused() -> None:
    memory = Memory(
        total_bytes=GIB, available_bytes=GIB, cgroup_limit_bytes=None, swap_bytes=0, shared_memory_bytes=0,
        memlock_bytes=None, numa_nodes=1,
    )  # fmt: skip
    with pytest.raises(UsageError, match="--gpu-memory 90% has no effect: the machine has no GPU"):
        override(Machine(gpus=(), memory=memory, disks=(), cores=8), MEASURED, gpu_memory=Share(0.9))


@given(machines())
def test_nothing_said_changes_nothing(machine: Machine) -> None:
    assert override(machine, MEASURED) == (machine, MEASURED)


@given(machines(least_gpus=1), counts)
def test_num_gpus_keeps_the_first_and_repeats_the_last(machine: Machine, count: int) -> None:
    gpus = override(machine, MEASURED, num_gpus=count)[0].gpus
    assert [gpu.index for gpu in gpus] == list(range(count))
    assert gpus[: len(machine.gpus)] == machine.gpus[:count]
    for copy in gpus[len(machine.gpus) :]:
        assert copy == replace(machine.gpus[-1], index=copy.index, uuid=None)


@given(machines(least_gpus=1), sizes, sizes)
def test_gpu_memory_caps_and_never_adds(machine: Machine, one: int, other: int) -> None:
    small, large = (override(machine, MEASURED, gpu_memory=cap)[0].gpus for cap in sorted((one, other)))
    for before, less, more in zip(machine.gpus, small, large, strict=True):
        assert less.total_bytes == min(before.total_bytes, one, other)
        assert less.free_bytes == min(before.free_bytes, one, other)
        assert less.free_bytes <= more.free_bytes <= before.free_bytes


@given(machines(), sizes, counts)
def test_machine_without_gpus_gets_as_many_of_that_size_as_were_asked_for(
    machine: Machine, size: int, count: int
) -> None:
    bare = replace(machine, gpus=())
    assert len(override(bare, MEASURED, gpu_memory=size)[0].gpus) == 1
    gpus = override(bare, MEASURED, gpu_memory=size, num_gpus=count)[0].gpus
    assert [(gpu.index, gpu.total_bytes, gpu.free_bytes) for gpu in gpus] == [(i, size, size) for i in range(count)]


@given(machines(), sizes, sizes)
def test_host_memory_is_what_was_said_and_more_never_leaves_less_free(machine: Machine, one: int, other: int) -> None:
    small, large = (override(machine, MEASURED, host_memory=size)[0].memory for size in sorted((one, other)))
    assert (small.total_bytes, large.total_bytes) == (min(one, other), max(one, other))
    assert 0 <= small.available_bytes <= large.available_bytes <= large.total_bytes
    assert small.available_bytes <= small.total_bytes
    same = override(machine, MEASURED, host_memory=machine.memory.total_bytes)[0].memory
    assert same.available_bytes == machine.memory.available_bytes
    assert large.cgroup_limit_bytes is None


@given(machines(), sizes)
def test_nvme_space_is_the_room_of_every_disk_and_makes_one_where_there_is_none(machine: Machine, size: int) -> None:
    disks = override(machine, MEASURED, nvme_space=size)[0].disks
    assert len(disks) == max(1, len(machine.disks))
    assert all(disk.free_bytes == size <= disk.total_bytes for disk in disks)


@given(machines(least_gpus=1, least_disks=1), speeds, speeds, counts)
def test_rates_that_were_given_replace_measured_ones_and_say_so(
    machine: Machine, link: float, disk: float, count: int
) -> None:
    changed, rates = override(machine, MEASURED, link_gbps=link, nvme_gbps=disk, num_gpus=count)
    assert rates.link_gbps == link
    assert rates.links_gbps == {n: n * link for n in range(1, count + 1)}
    assert [rates.of_disk(each) for each in changed.disks] == [disk] * len(machine.disks)
    assert rates.disk_gbps is not None
    assert "/other" not in rates.disk_gbps
    assert {name: rates.origin(name) for name in rates.known} == {
        "link_gbps": "given", "links_gbps": "given", "disk_gbps": "given", "hbm_gbps": "measured",
    }  # fmt: skip


@given(machines())
def test_a_flag_that_could_have_no_effect_is_refused_by_name(machine: Machine) -> None:
    bare = replace(machine, gpus=(), disks=())
    with pytest.raises(UsageError, match="--num-gpus has no effect"):
        override(bare, MEASURED, num_gpus=2)
    with pytest.raises(UsageError, match="--link-gbps has no effect"):
        override(bare, MEASURED, link_gbps=25.0)
    with pytest.raises(UsageError, match="--nvme-gbps has no effect"):
        override(bare, MEASURED, nvme_gbps=3.0)
