"""What DeepSpeed's NVMe op needs, on fake folders and with real processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from fake_aio_op import WORKING

from zeroinf.hardware import aio_op
from zeroinf.hardware.aio_op import extensions_root, find_lock, read_aio_op, unreadable_architectures


@contextmanager
def running(command: list[str], folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def extensions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An extensions folder in which both ops are built."""
    for op in ("pin_memory", "async_io"):
        (tmp_path / op).mkdir()
        (tmp_path / op / f"{op}.so").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    return tmp_path


def build_folder_of_torch() -> Path:
    from torch.utils.cpp_extension import _get_build_directory

    return Path(_get_build_directory("async_io", verbose=False))


@pytest.mark.parametrize("cuda", [None, "12.8"])
def test_extensions_root_is_torchs_own(cuda: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(aio_op, "_run_package_file", lambda *_: {"cuda": cuda, "hip": None})
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert extensions_root() / "async_io" == build_folder_of_torch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "chosen"))
    assert extensions_root() / "async_io" == build_folder_of_torch()


def test_cuda_of_the_installed_torch_is_read_without_importing_it() -> None:
    import torch

    assert aio_op._run_package_file("torch", "version.py")["cuda"] == torch.version.cuda


def test_op_counts_as_built_only_when_both_libraries_are_there(extensions: Path) -> None:
    assert read_aio_op(with_gpu=False).built
    assert read_aio_op(with_gpu=False).folder == extensions / "async_io"
    (extensions / "pin_memory" / "pin_memory.so").unlink()
    assert not read_aio_op(with_gpu=False).built


def test_stale_lock_is_found_and_named_with_its_path(extensions: Path) -> None:
    lock = extensions / "async_io" / "lock"
    assert read_aio_op(with_gpu=False).lock is None
    lock.touch()
    op = read_aio_op(with_gpu=False)
    assert (op.lock, op.lock_is_stale) == (lock, True)
    (problem,) = [problem for problem in op.problems() if problem.name == "build lock"]
    assert str(lock) in problem.message
    assert f"rm {lock}" in problem.hint


def test_stale_lock_of_pin_memory_is_found_too(extensions: Path) -> None:
    lock = extensions / "pin_memory" / "lock"
    lock.touch()
    assert find_lock(extensions / "pin_memory", extensions / "async_io") == (lock, True)


def test_lock_is_live_while_ninja_works_in_its_folder(extensions: Path, tmp_path: Path) -> None:
    folder = extensions / "async_io"
    (folder / "lock").touch()
    ninja = tmp_path / "ninja"
    shutil.copy(shutil.which("sleep") or "sleep", ninja)
    with running([str(ninja), "60"], folder):
        assert find_lock(folder) == (folder / "lock", False)
        assert read_aio_op(with_gpu=False).lock_is_stale is False
    assert find_lock(folder) == (folder / "lock", True)


def test_lock_is_live_while_a_process_holds_it_open_as_torch_does(extensions: Path, tmp_path: Path) -> None:
    lock = extensions / "async_io" / "lock"
    program = f"""
import time
from os import O_CREAT, O_EXCL, open
open({str(lock)!r}, O_CREAT | O_EXCL)
print("held", flush=True)
time.sleep(60)
"""
    with running([sys.executable, "-c", program], tmp_path) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        assert find_lock(lock.parent) == (lock, False)
    assert find_lock(lock.parent) == (lock, True)


def test_shell_standing_in_the_folder_does_not_keep_a_lock_alive(extensions: Path) -> None:
    folder = extensions / "async_io"
    (folder / "lock").touch()
    with running(["sleep", "60"], folder):
        assert find_lock(folder) == (folder / "lock", True)


def test_process_that_may_not_be_looked_at_is_passed_over(extensions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hidden:
        def name(self) -> str:
            return "ninja"

        def cwd(self) -> str:
            raise aio_op.psutil.AccessDenied(1)

    monkeypatch.setattr(aio_op.psutil, "process_iter", lambda: [Hidden()])
    lock = extensions / "async_io" / "lock"
    lock.touch()
    assert find_lock(lock.parent) == (lock, True)


def test_lock_released_while_processes_are_looked_at_is_not_stale(
    extensions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = extensions / "async_io" / "lock"
    lock.touch()

    def build_ends(held: Path) -> bool:
        held.unlink()
        return False

    monkeypatch.setattr(aio_op, "is_building", build_ends)
    assert find_lock(lock.parent) == (None, False)


@pytest.mark.parametrize(
    ("change", "name", "advice"),
    [
        ({"header": None}, "libaio", "libaio-dev"),
        ({"library": None}, "libaio", "libaio-dev"),
        ({"compiler": None}, "compiler", "g++"),
        ({"ninja": None}, "ninja", "PATH"),
        ({"nvcc": None}, "nvcc", "CUDA_HOME"),
        ({"unreadable_architectures": ("9.0a",)}, "TORCH_CUDA_ARCH_LIST", "TORCH_CUDA_ARCH_LIST='9.0'"),
        ({"lock": Path("ext/lock"), "lock_is_stale": True}, "build lock", "rm ext/lock"),
    ],
)
def test_each_missing_piece_is_a_problem_with_a_hint(change: dict[str, object], name: str, advice: str) -> None:
    assert WORKING.problems() == ()
    (problem,) = replace(WORKING, **change).problems()  # type: ignore[arg-type]
    assert problem.name == name
    assert advice in problem.hint


def test_live_lock_is_no_problem() -> None:
    assert replace(WORKING, lock=Path("ext/lock"), lock_is_stale=False).problems() == ()


def test_cuda_pieces_do_not_matter_without_a_gpu() -> None:
    lacking = replace(WORKING, nvcc=None, unreadable_architectures=("9.0a",))
    assert len(lacking.problems()) == 2
    assert replace(lacking, with_cuda=False).problems() == ()


def test_op_installed_with_deepspeed_needs_nothing() -> None:
    bare = replace(WORKING, built=False, compiler=None, header=None)
    assert len(bare.problems()) == 2
    assert replace(bare, prebuilt=True).problems() == ()


@pytest.mark.parametrize(
    ("setting", "unreadable"),
    [
        ("", ()),
        ("9.0", ()),
        ("8.0;9.0+PTX", ()),
        ("8.0 9.0a", ("9.0a",)),
        ("9.0a+PTX;10.0a", ("9.0a+PTX", "10.0a")),
        ("Hopper", ("Hopper",)),
    ],
)
def test_architectures_that_break_deepspeeds_build_are_found(setting: str, unreadable: tuple[str, ...]) -> None:
    assert unreadable_architectures(setting) == unreadable


def test_pieces_are_looked_for_where_the_environment_points(
    extensions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    for name in ("libaio.h", "libaio.so"):
        (tmp_path / "here" / name).touch()
    for name in ("my-c++", "ninja"):
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CFLAGS", f"-O2 -I{tmp_path / 'here'}")
    monkeypatch.setenv("LDFLAGS", f"-L{tmp_path / 'here'}")
    monkeypatch.setenv("CXX", "my-c++ -pipe")
    op = read_aio_op(with_gpu=False)
    assert (op.header, op.library) == (tmp_path / "here" / "libaio.h", tmp_path / "here" / "libaio.so")
    assert (op.compiler, op.ninja) == (tmp_path / "my-c++", tmp_path / "ninja")
    monkeypatch.setenv("CXX", "absent-compiler")
    monkeypatch.setenv("PATH", os.devnull)
    op = read_aio_op(with_gpu=False)
    assert (op.compiler, op.ninja) == (None, None)


def test_nvcc_is_looked_for_in_cuda_home_before_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toolkit" / "bin").mkdir(parents=True)
    (tmp_path / "toolkit" / "bin" / "nvcc").touch(mode=0o755)
    (tmp_path / "nvcc").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    assert aio_op.find_nvcc() == tmp_path / "toolkit" / "bin" / "nvcc"
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "empty"))
    assert aio_op.find_nvcc() is None
    monkeypatch.delenv("CUDA_HOME")
    assert aio_op.find_nvcc() == tmp_path / "nvcc"


def test_prebuilt_ops_count_for_their_own_accelerator_only(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"accelerator_name": "cuda", "installed_ops": {"async_io": True, "pin_memory": True}}
    monkeypatch.setattr(aio_op, "_run_package_file", lambda *_: installed)
    assert aio_op._is_prebuilt("cuda")
    assert not aio_op._is_prebuilt("cpu")
    installed["installed_ops"] = {"async_io": True}
    assert not aio_op._is_prebuilt("cuda")
