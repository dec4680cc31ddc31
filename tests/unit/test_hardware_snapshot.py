"""The snapshot of memory, disks and versions."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from zeroinf.hardware import disk as disk_module
from zeroinf.hardware.disk import mount_of, read_disk, supports_o_direct
from zeroinf.hardware.snapshot import PACKAGES, read_machine, read_memlock, read_memory, read_versions

GIB = 1 << 30
FIRST_NAMESPACE = "         0          0 4294967295\n"
ROOTLESS_NAMESPACE = "         0       1000          1\n"
CAP_IPC_LOCK_ONLY = "0000000000004000"
ALL_BUT_IPC_LOCK = "000001ffffffbfff"


def fake_proc(folder: Path, *, capabilities: str, uid_map: str = FIRST_NAMESPACE, cgroup: str = "0::/\n") -> Path:
    (folder / "self").mkdir(parents=True)
    (folder / "self" / "status").write_text(f"Name:\tpython\nCapPrm:\tffffffffffffffff\nCapEff:\t{capabilities}\n")
    (folder / "self" / "uid_map").write_text(uid_map)
    (folder / "self" / "cgroup").write_text(cgroup)
    return folder


@pytest.fixture
def memlock_of_8_mib(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (8 << 20, resource.RLIM_INFINITY))
    return 8 << 20


def test_memory_never_promises_more_than_the_cgroup_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    physical = SimpleNamespace(total=64 * GIB, available=60 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: physical)
    cgroup = tmp_path / "cgroup"
    cgroup.mkdir()
    (cgroup / "memory.max").write_text(str(16 * GIB))
    (cgroup / "memory.current").write_text(str(4 * GIB))
    proc = fake_proc(tmp_path / "proc", capabilities="0")
    memory = read_memory(proc=proc, cgroup=cgroup)
    assert (memory.total_bytes, memory.available_bytes, memory.cgroup_limit_bytes) == (16 * GIB, 12 * GIB, 16 * GIB)
    unlimited = read_memory(proc=proc, cgroup=tmp_path / "none")
    assert (unlimited.total_bytes, unlimited.available_bytes) == (64 * GIB, 60 * GIB)
    assert unlimited.cgroup_limit_bytes is None


def test_cgroup_limit_above_physical_memory_does_not_add_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=8 * GIB, available=2 * GIB))
    (tmp_path / "memory.max").write_text(str(32 * GIB))
    memory = read_memory(proc=fake_proc(tmp_path / "proc", capabilities="0"), cgroup=tmp_path)
    assert (memory.total_bytes, memory.available_bytes) == (8 * GIB, 2 * GIB)


def test_numa_nodes_and_shared_memory_are_read(tmp_path: Path) -> None:
    for name in ("node0", "node1", "possible"):
        (tmp_path / name).mkdir()
    memory = read_memory(nodes=tmp_path, shared_memory=tmp_path / "no-such-mount")
    assert memory.numa_nodes == 2
    assert memory.shared_memory_bytes == 0
    assert read_memory(shared_memory=tmp_path).shared_memory_bytes > 0


def test_tiny_memlock_limit_is_reported(tmp_path: Path, memlock_of_8_mib: int) -> None:
    assert read_memlock(fake_proc(tmp_path, capabilities=ALL_BUT_IPC_LOCK)) == memlock_of_8_mib


@pytest.mark.usefixtures("memlock_of_8_mib")
def test_cap_ipc_lock_lifts_the_memlock_limit(tmp_path: Path) -> None:
    assert read_memlock(fake_proc(tmp_path, capabilities=CAP_IPC_LOCK_ONLY)) is None


def test_cap_ipc_lock_of_a_rootless_container_does_not_lift_the_limit(tmp_path: Path, memlock_of_8_mib: int) -> None:
    proc = fake_proc(tmp_path, capabilities=CAP_IPC_LOCK_ONLY, uid_map=ROOTLESS_NAMESPACE)
    assert read_memlock(proc) == memlock_of_8_mib


def test_infinite_memlock_limit_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert read_memlock(fake_proc(tmp_path, capabilities="0")) is None


def test_folder_is_probed_and_left_as_it_was(tmp_path: Path) -> None:
    found = read_disk(tmp_path)
    assert found.exists
    assert found.writable
    assert 0 < found.free_bytes <= found.total_bytes
    assert found.filesystem
    assert list(tmp_path.iterdir()) == []


def test_missing_folder_and_file_in_its_place_do_not_exist(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert not read_disk(tmp_path / "absent").exists
    assert not read_disk(tmp_path / "file").exists


def test_folder_that_refuses_new_files_is_not_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(disk_module.tempfile, "mkstemp", refuse)
    found = read_disk(tmp_path)
    assert found.exists
    assert not found.writable
    assert not found.o_direct


def test_o_direct_is_tried_with_the_flag_and_its_refusal_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "probe"
    file.touch()
    real_open, flags_seen = os.open, []

    def page_cache_open(path: Path, flags: int) -> int:
        flags_seen.append(flags)
        return real_open(path, flags & ~os.O_DIRECT)

    monkeypatch.setattr(os, "open", page_cache_open)
    assert supports_o_direct(file)
    assert flags_seen[0] & os.O_DIRECT
    assert file.stat().st_size == 4096

    def refuse(path: Path, flags: int) -> int:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "open", refuse)
    assert not supports_o_direct(file)


def test_full_disk_does_not_pass_for_one_without_o_direct(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "probe"
    file.touch()
    real_open = os.open
    monkeypatch.setattr(os, "open", lambda path, flags: real_open(path, flags & ~os.O_DIRECT))

    def no_room(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwritev", no_room)
    assert supports_o_direct(file)


def test_file_system_is_that_of_the_innermost_and_latest_mount(monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = [("/", "ext4"), ("/data", "xfs"), ("/data", "nfs4"), ("/data2", "btrfs")]
    listing = [SimpleNamespace(mountpoint=folder, fstype=kind, device=f"of-{kind}") for folder, kind in mounts]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: listing)  # noqa: A006 - psutil's own word
    assert mount_of(Path("/data/weights")) == (Path("/data"), "of-nfs4", "nfs4")
    assert mount_of(Path("/data2/weights")) == (Path("/data2"), "of-btrfs", "btrfs")
    assert mount_of(Path("/elsewhere")) == (Path("/"), "of-ext4", "ext4")
    listing.clear()
    assert mount_of(Path("/elsewhere")) == (None, "", "")


def test_folders_of_one_file_system_are_one_volume(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    outer, inner = read_disk(tmp_path), read_disk(tmp_path / "inside")
    assert outer.volume == inner.volume
    assert tmp_path.resolve().is_relative_to(outer.volume)
    assert outer.device
    assert read_disk(tmp_path / "absent").volume == str(tmp_path / "absent")


def test_versions_name_what_is_installed_and_leave_out_what_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zeroinf.hardware.snapshot.PACKAGES", ("psutil", "surely-not-installed"))
    assert read_versions() == {"python": sys.version.split()[0], "psutil": psutil.__version__}
    assert "deepspeed" in PACKAGES


def test_machine_holds_each_disk_that_was_named(tmp_path: Path) -> None:
    machine = read_machine([tmp_path, tmp_path / "absent"])
    assert [disk.exists for disk in machine.disks] == [True, False]
    assert machine.cores >= 1
    assert machine.hostname
    assert machine.memory.available_bytes <= machine.memory.total_bytes


def test_snapshot_and_op_are_read_without_importing_torch_or_deepspeed() -> None:
    program = """
import sys
from zeroinf.hardware.aio_op import read_aio_op
from zeroinf.hardware.snapshot import read_machine
read_machine(), read_aio_op(with_gpu=True)
print(*({"torch", "deepspeed", "transformers"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
