"""Checks the requirements of DeepSpeed's asynchronous disk I/O op (`async_io`): compiler, libaio, a finished build.

DeepSpeed compiles its `async_io` op, and `pin_memory` which that op links to, on first use, and still asks for
compiler, libaio and ninja on every later start. A killed build leaves a `lock` file on which all later runs wait for
ever without a message. All of this is checked here without importing torch or deepspeed.
"""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

OPS = ("pin_memory", "async_io")
BUILDERS = frozenset(
    {
        "ninja",
        "c++",
        "g++",
        "gcc",
        "cc1plus",
        "clang",
        "clang++",
        "nvcc",
        "cicc",
        "ptxas",
        "cudafe++",
        "as",
        "ld",
        "collect2",
    }
)
# What DeepSpeed's `compute_capability_args` can read: it takes both halves of "9.0" as whole numbers.
READABLE_ARCHITECTURE = re.compile(r"\d+\.\d+(\+PTX)?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """Why the op cannot work: `name` of the missing piece, what was found, and what to do."""

    name: str
    message: str
    hint: str


@dataclass(frozen=True, kw_only=True, slots=True)
class AioOp:
    """The state of DeepSpeed's `async_io` op on this machine. Paths are None where nothing was found.

    `folder` is where torch builds it; `built` says that compiled files are there, `prebuilt` that DeepSpeed was
    installed with them and compiles nothing. `lock` is the build lock, `lock_is_stale` that no process is building.
    `nvcc` and `unreadable_architectures` (entries of TORCH_CUDA_ARCH_LIST) matter `with_cuda` only.
    """

    folder: Path
    built: bool
    prebuilt: bool
    lock: Path | None
    lock_is_stale: bool
    header: Path | None
    library: Path | None
    compiler: Path | None
    ninja: Path | None
    with_cuda: bool
    nvcc: Path | None
    unreadable_architectures: tuple[str, ...]

    @property
    def usable_at_once(self) -> bool:
        """Nothing has to be compiled first."""
        return self.built or self.prebuilt

    def problems(self) -> tuple[Problem, ...]:
        """Everything that would stop a run which uses the op; empty when it can work."""
        if self.prebuilt:
            return ()
        return tuple(self._lacking())

    def _lacking(self) -> Iterator[Problem]:
        if self.header is None or self.library is None:
            missing = "header libaio.h" if self.header is None else "library libaio.so"
            hint = "install it: apt install libaio-dev, dnf install libaio-devel, or set CFLAGS=-I... and LDFLAGS=-L..."
            yield Problem(name="libaio", message=f"{missing} not found", hint=hint)
        if self.compiler is None:
            yield Problem(
                name="compiler", message="no C++ compiler found", hint="install g++, or set CXX to a compiler"
            )
        if self.ninja is None:
            hint = "pip install ninja, and put the environment's bin folder on PATH (activate it)"
            yield Problem(name="ninja", message="not found on PATH", hint=hint)
        if self.with_cuda and self.nvcc is None:
            hint = "install the CUDA toolkit of torch's CUDA version, or set CUDA_HOME to it"
            yield Problem(name="nvcc", message="no CUDA compiler found", hint=hint)
        if self.with_cuda and self.unreadable_architectures:
            yield self.architecture_problem()
        if self.lock is not None and self.lock_is_stale:
            hint = f"remove it: rm {shlex.quote(str(self.lock))} (unless another host is building in that folder)"
            yield Problem(name="build lock", message=f"left by a killed build: {self.lock}", hint=hint)

    def architecture_problem(self) -> Problem:
        """The message for a TORCH_CUDA_ARCH_LIST that DeepSpeed cannot read."""
        listed = ", ".join(self.unreadable_architectures)
        plain = dict.fromkeys(re.sub(r"(\d+\.\d+)[a-z]", r"\1", entry) for entry in self.unreadable_architectures)
        hint = f"export TORCH_CUDA_ARCH_LIST={';'.join(plain)!r}"
        return Problem(name="TORCH_CUDA_ARCH_LIST", message=f"DeepSpeed cannot read {listed}", hint=hint)


def read_aio_op(*, with_gpu: bool) -> AioOp:
    """The op's state; `with_gpu` says whether CUDA finds a GPU here, in which case the op is built against CUDA."""
    with_cuda = with_gpu and _run_package_file("torch", "version.py").get("cuda") is not None
    root = extensions_root()
    lock, lock_is_stale = find_lock(*(root / op for op in OPS))
    return AioOp(
        folder=root / "async_io",
        built=all((root / op / f"{op}.so").is_file() for op in OPS),
        prebuilt=_is_prebuilt("cuda" if with_cuda else "cpu"),
        lock=lock,
        lock_is_stale=lock_is_stale,
        header=_first_file(include_folders(), "libaio.h"),
        library=_first_file(library_folders(), "libaio.so", "libaio.a"),
        compiler=find_compiler(),
        ninja=_which("ninja"),
        with_cuda=with_cuda,
        nvcc=find_nvcc(),
        unreadable_architectures=unreadable_architectures(os.environ.get("TORCH_CUDA_ARCH_LIST", "")),
    )


def extensions_root() -> Path:
    """The folder in which torch builds extensions, by the rules of `torch.utils.cpp_extension._get_build_directory`."""
    chosen = os.environ.get("TORCH_EXTENSIONS_DIR")
    if chosen is not None:
        return Path(chosen)
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    version = _run_package_file("torch", "version.py")
    accelerator = "cpu"
    for prefix, key in (("rocm", "hip"), ("cu", "cuda")):
        if version.get(key) is not None:
            accelerator = prefix + version[key].replace(".", "")
            break
    python = f"py{sys.version_info.major}{sys.version_info.minor}{sys.abiflags}"
    return (cache / "torch_extensions").resolve() / f"{python}_{accelerator}"


def find_lock(*folders: Path) -> tuple[Path | None, bool]:
    """The build lock in the first of `folders` that has one, stale ones first, and whether it is stale."""
    locks = [folder / "lock" for folder in folders if (folder / "lock").exists()]
    idle = [lock for lock in locks if not is_building(lock)]
    # A builder that ended while we looked has taken its lock along: only one that is still there was left behind.
    stale = [lock for lock in idle if lock.exists()]
    live = [lock for lock in locks if lock not in idle]
    return next(iter(stale + live), None), bool(stale)


def is_building(lock: Path) -> bool:
    """Whether a process of this host holds the build lock open, as torch does, or compiles in the lock's folder."""
    return any(_builds(process, lock.resolve()) for process in psutil.process_iter())


def _builds(process: psutil.Process, lock: Path) -> bool:
    try:
        if process.name() in BUILDERS and Path(process.cwd()) == lock.parent:
            return True
        return any(Path(file.path) == lock for file in process.open_files())
    except (psutil.Error, OSError):
        return False


def find_compiler() -> Path | None:
    """The C++ compiler torch would call: $CXX (maybe a launcher with arguments), and nothing else where it is set."""
    chosen = shlex.split(os.environ.get("CXX", ""))
    return _which(chosen[0]) if chosen else _which("c++") or _which("g++")


def find_nvcc() -> Path | None:
    """nvcc where torch looks for the CUDA toolkit: CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home is None:
        return _which("nvcc") or _first_file([Path("/usr/local/cuda/bin")], "nvcc")
    return _first_file([Path(home, "bin")], "nvcc")


def include_folders() -> list[Path]:
    """The compiler's header search path: the folders of CFLAGS and CPATH, then the system's."""
    return [*_named_folders("-I", "CFLAGS", "CPATH"), Path("/usr/local/include"), Path("/usr/include")]


def library_folders() -> list[Path]:
    """The linker's search path: the folders of LDFLAGS and LIBRARY_PATH, then the system's."""
    system = [Path(root) / name for root in ("/usr/local", "/usr", "/") for name in ("lib64", "lib")]
    multiarch = [folder for base in (Path("/usr/lib"), Path("/lib")) for folder in base.glob("*-linux-gnu*")]
    return [*_named_folders("-L", "LDFLAGS", "LIBRARY_PATH"), *system, *multiarch]


def unreadable_architectures(setting: str) -> tuple[str, ...]:
    """The entries of a TORCH_CUDA_ARCH_LIST on which DeepSpeed's build fails, such as 9.0a."""
    return tuple(
        entry for entry in re.split(r"[;\s]+", setting) if entry and not READABLE_ARCHITECTURE.fullmatch(entry)
    )


def _named_folders(flag: str, flags_variable: str, path_variable: str) -> list[Path]:
    flags = shlex.split(os.environ.get(flags_variable, ""))
    given = [word.removeprefix(flag) for word in flags if word.startswith(flag)]
    return [Path(name) for name in given + os.environ.get(path_variable, "").split(os.pathsep) if name]


def _first_file(folders: list[Path], *names: str) -> Path | None:
    return next((folder / name for folder in folders for name in names if (folder / name).is_file()), None)


def _which(command: str) -> Path | None:
    found = shutil.which(command)
    return None if found is None else Path(found)


def _is_prebuilt(accelerator: str) -> bool:
    """Whether DeepSpeed was installed with the ops compiled (DS_BUILD_AIO=1), for this accelerator."""
    installed = _run_package_file("deepspeed", "git_version_info_installed.py")
    ops = installed.get("installed_ops", {})
    return installed.get("accelerator_name") == accelerator and all(ops.get(op, False) for op in OPS)


def _run_package_file(package: str, file: str) -> dict[str, Any]:
    """Run one file of constants in `package` without importing the package; empty if it is missing."""
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    path = Path(folders[0], file) if folders else None
    return runpy.run_path(str(path)) if path and path.is_file() else {}
