"""Limits of containers, of memory and of processors' time, on fake cgroup trees."""

from __future__ import annotations

from math import inf
from pathlib import Path

import pytest

from zeroinf.hardware.cgroup import CgroupMemory, read_cgroup_memory, read_cgroup_processors

GIB = 1 << 30
V1_NO_LIMIT = 9223372036854771712


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    (tmp_path / "proc" / "self").mkdir(parents=True)
    return tmp_path / "proc"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "cgroup").mkdir()
    return tmp_path / "cgroup"


def in_group(proc: Path, *lines: str) -> None:
    (proc / "self" / "cgroup").write_text("\n".join(lines) + "\n")


def v2_group(folder: Path, *, limit: int | str, usage: int = 0, active_file: int = 0, inactive_file: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(f"anon 1\nactive_file {active_file}\ninactive_file {inactive_file}\n")


def v1_group(folder: Path, *, limit: int, usage: int = 0, total_file: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(
        f"active_file 7\ninactive_file 7\ntotal_active_file {total_file}\ntotal_inactive_file 0\n"
    )


def test_v2_limit_of_a_parent_binds_a_child_without_one(proc: Path, root: Path) -> None:
    in_group(proc, "0::/job/step")
    v2_group(root / "job", limit=8 * GIB, usage=3 * GIB)
    v2_group(root / "job" / "step", limit="max", usage=2 * GIB)
    assert read_cgroup_memory(proc, root) == CgroupMemory(limit_bytes=8 * GIB, available_bytes=5 * GIB)


def test_v2_file_cache_counts_as_available(proc: Path, root: Path) -> None:
    in_group(proc, "0::/job")
    v2_group(root / "job", limit=8 * GIB, usage=7 * GIB, active_file=1 * GIB, inactive_file=4 * GIB)
    found = read_cgroup_memory(proc, root)
    assert found is not None
    assert found.available_bytes == 6 * GIB


def test_full_parent_leaves_less_than_the_smaller_limit_of_its_child(proc: Path, root: Path) -> None:
    in_group(proc, "0::/job/step")
    v2_group(root / "job", limit=10 * GIB, usage=9 * GIB)
    v2_group(root / "job" / "step", limit=4 * GIB)
    assert read_cgroup_memory(proc, root) == CgroupMemory(limit_bytes=4 * GIB, available_bytes=1 * GIB)


def test_v2_root_is_read_where_a_container_sees_the_path_of_its_host(proc: Path, root: Path) -> None:
    in_group(proc, "0::/docker/0123abcd")
    v2_group(root, limit=2 * GIB, usage=1 * GIB)
    assert read_cgroup_memory(proc, root) == CgroupMemory(limit_bytes=2 * GIB, available_bytes=1 * GIB)


def test_v1_limit_is_found_with_the_cache_of_child_groups(proc: Path, root: Path) -> None:
    in_group(proc, "5:cpu,cpuacct:/job", "4:memory:/job", "0::/")
    v1_group(root / "memory", limit=V1_NO_LIMIT, usage=50 * GIB)
    v1_group(root / "memory" / "job", limit=6 * GIB, usage=4 * GIB, total_file=3 * GIB)
    assert read_cgroup_memory(proc, root) == CgroupMemory(limit_bytes=6 * GIB, available_bytes=5 * GIB)


def test_v1_huge_number_means_no_limit(proc: Path, root: Path) -> None:
    in_group(proc, "4:memory:/job")
    v1_group(root / "memory" / "job", limit=V1_NO_LIMIT, usage=GIB)
    assert read_cgroup_memory(proc, root) is None
    v1_group(root / "memory" / "job", limit=3 * GIB, usage=GIB)
    assert read_cgroup_memory(proc, root) is not None


def test_hybrid_machine_takes_the_smaller_of_both_versions(proc: Path, root: Path) -> None:
    in_group(proc, "4:memory:/a", "0::/b")
    v1_group(root / "memory" / "a", limit=6 * GIB)
    v2_group(root / "unified" / "b", limit=5 * GIB)
    found = read_cgroup_memory(proc, root)
    assert found is not None
    assert found.limit_bytes == 5 * GIB


def test_more_cache_than_usage_never_makes_more_available_than_the_limit(proc: Path, root: Path) -> None:
    in_group(proc, "0::/job")
    v2_group(root / "job", limit=4 * GIB, usage=1 * GIB, active_file=2 * GIB)
    assert read_cgroup_memory(proc, root) == CgroupMemory(limit_bytes=4 * GIB, available_bytes=4 * GIB)


def test_group_over_its_limit_has_nothing_available(proc: Path, root: Path) -> None:
    in_group(proc, "0::/job")
    v2_group(root / "job", limit=1 * GIB, usage=2 * GIB)
    assert read_cgroup_memory(proc, root) == CgroupMemory(limit_bytes=GIB, available_bytes=0)


def test_system_without_cgroups_has_no_limit(tmp_path: Path) -> None:
    assert read_cgroup_memory(tmp_path / "no-proc", tmp_path / "no-cgroup") is None


@pytest.mark.parametrize(
    ("own", "parent", "expected"),
    [("600000 100000", "max 100000", 6.0), ("max 100000", "150000 100000", 1.5), ("max 100000", "max 100000", inf)],
)
def test_the_smallest_v2_quota_of_time_binds(proc: Path, root: Path, own: str, parent: str, expected: float) -> None:
    in_group(proc, "0::/job/step")
    for folder, text in ((root / "job" / "step", own), (root / "job", parent)):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cpu.max").write_text(f"{text}\n")
    assert read_cgroup_processors(proc, root) == expected


@pytest.mark.parametrize(("quota", "expected"), [(400000, 4.0), (-1, inf)])
def test_a_v1_quota_of_time_is_read_where_it_is_mounted(proc: Path, root: Path, quota: int, expected: float) -> None:
    in_group(proc, "4:memory:/a", "2:cpu,cpuacct:/of/the/host")
    (root / "cpu").mkdir()
    (root / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (root / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert read_cgroup_processors(proc, root) == expected
