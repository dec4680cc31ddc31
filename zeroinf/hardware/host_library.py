"""Compiles and loads the C++ code with which the CPU attends to keys and values in host memory.

`host_attention.cpp` is compiled once for a processor's instructions, in a few seconds, and kept in the cache directory
under a name that follows from the source, the flags, the compiler and the processor. It needs a C++ compiler (`$CXX`,
c++, g++ or clang++) and neither torch's headers nor Python's. Addresses go in and nothing comes out: it knows no
tensors.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

from zeroinf.errors import EnvironmentProblem
from zeroinf.paths import cache_directory

SOURCE = Path(__file__).with_name("host_attention.cpp")
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-pthread")
_COMPILERS = ("c++", "g++", "clang++")
_BUILD_S = 600
_OTHERWISE = "--kv-attention gpu, or another compiler in CXX"


class HostLayout(ctypes.Structure):
    """The layout of records, and the steps from products to weights, as `host_attention.cpp` has them."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("stride", "keys_at", "values_at", "key_scales_at", "value_scales_at")),
        *((name, ctypes.c_int32) for name in ("heads", "group", "width", "value_width", "kind", "query_kind")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
        ("sinks", ctypes.c_void_p),
    )


def why_no_host_kernel() -> str:
    """Why attention on the CPU cannot be compiled here; empty where it can."""
    if _compiler():
        return ""
    return f"no C++ compiler is found ({os.environ.get('CXX') or ', '.join(_COMPILERS)})"


def _compiler() -> list[str]:
    """The command of the first compiler that is there; empty where there is none."""
    chosen = os.environ.get("CXX")
    for command in [shlex.split(chosen)] if chosen else [[name] for name in _COMPILERS]:
        if command and shutil.which(command[0]):
            return command
    return []


@cache
def host_library(machine: str = "native") -> ctypes.CDLL:
    """The library for the instructions of `machine`, compiled where it is not there yet.

    Raises EnvironmentProblem where it cannot be compiled or loaded.
    """
    if problem := why_no_host_kernel():
        raise EnvironmentProblem(f"attention on the CPU cannot be compiled: {problem}", hint="install g++, or set CXX")
    command = [*_compiler(), *FLAGS, _machine_flag(machine)]
    file = cache_directory() / "host-attention" / f"{_name(command)}.so"
    if not file.exists():
        _build(command, file)
    try:
        library = ctypes.CDLL(str(file))
    except OSError as error:
        raise EnvironmentProblem(f"{file} cannot be loaded: {error}", hint="remove it") from error
    library.zeroinf_new_pool.restype = ctypes.c_void_p
    library.zeroinf_new_pool.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
    library.zeroinf_end_pool.restype = None
    library.zeroinf_end_pool.argtypes = (ctypes.c_void_p,)
    library.zeroinf_clear.restype = None
    library.zeroinf_clear.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    library.zeroinf_read.restype = ctypes.c_uint64
    library.zeroinf_read.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    library.zeroinf_submit.restype = ctypes.c_int64
    library.zeroinf_submit.argtypes = (
        ctypes.c_void_p,
        ctypes.POINTER(HostLayout),
        ctypes.c_void_p,
        ctypes.c_int64,
        *(ctypes.c_void_p,) * 5,
    )
    library.zeroinf_seconds.restype = ctypes.c_double
    library.zeroinf_seconds.argtypes = (ctypes.c_void_p,)
    library.zeroinf_wait.restype = ctypes.c_int
    library.zeroinf_wait.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_double)
    return library


def _machine_flag(machine: str) -> str:
    return f"-mcpu={machine}" if platform.machine() in ("aarch64", "arm64") else f"-march={machine}"


def _name(command: Sequence[str]) -> str:
    """A name for what `command` makes on this processor."""
    compiler = Path(shutil.which(command[0]) or command[0]).resolve()
    sources = sorted(SOURCE.parent.glob(f"{SOURCE.stem}*"))
    facts = [source.read_bytes() for source in sources]
    facts += ["\0".join((str(compiler), *command)).encode(), _instructions().encode()]
    with suppress(OSError):
        facts.append(str(compiler.stat().st_mtime_ns).encode())
    return hashlib.blake2b(b"\0".join(facts), digest_size=16).hexdigest()


def _instructions() -> str:
    """The instructions that the processor knows, as the kernel of the system lists them."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return platform.processor()


def _build(command: Sequence[str], file: Path) -> None:
    """Compile into `file`, which appears when it is whole. Processes that do so at once do not disturb each other."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        number, name = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
    except OSError as error:
        raise EnvironmentProblem(
            f"attention on the CPU cannot be kept in {file.parent}: {error.strerror}",
            hint="set ZEROINF_CACHE to another folder",
        ) from error
    os.close(number)
    made = Path(name)
    try:
        ran = subprocess.run(
            [*command, "-o", name, str(SOURCE)], capture_output=True, text=True, timeout=_BUILD_S, check=False
        )
        if ran.returncode:
            reason = next((line for line in ran.stderr.splitlines() if "error" in line), f"exit code {ran.returncode}")
            raise EnvironmentProblem(
                f"attention on the CPU does not compile: {reason}",
                hint="--kv-attention gpu, or another compiler in CXX",
            )
        made.chmod(0o755)
        made.replace(file)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EnvironmentProblem(f"attention on the CPU does not compile: {error}", hint=_OTHERWISE) from error
    finally:
        made.unlink(missing_ok=True)


class ThreadPool:
    """Threads of the library that work on one call or step at a time and sleep in between. Calls let other threads of
    Python go on.
    """

    def __init__(self, threads: int | Sequence[int], machine: str = "native") -> None:
        """So many threads, or one for each of the processors of these numbers, among which they stay.

        Raises EnvironmentProblem where the system has no more.
        """
        processors = () if isinstance(threads, int) else tuple(threads)
        self.threads, self._library = len(processors) or threads, host_library(machine)
        numbers = (ctypes.c_int * len(processors))(*processors)
        self._pool: int | None = self._library.zeroinf_new_pool(self.threads, numbers, len(processors))
        if self._pool is None:
            raise EnvironmentProblem(
                f"{self.threads} threads for attention on the CPU cannot be started",
                hint="allow this process more threads or memory (ulimit -u, ulimit -v), or --kv-attention gpu",
            )
        self._process = os.getpid()

    def submit(
        self, layout: HostLayout, rows: int, count: int, memory: int, fresh: int, query: int, out: int, flag: int | None
    ) -> int:
        """Attend to what lies at the given addresses, and stays there, once the number at `flag` (int64), if there is
        one, has reached that of the step, which is returned; see `zeroinf_submit`. None of Python's threads waits."""
        layout_at = ctypes.byref(layout)
        number: int = self._library.zeroinf_submit(self._pool, layout_at, rows, count, memory, fresh, query, out, flag)
        return number

    def wait(self, number: int, seconds: float) -> bool:
        """Whether a step is over, at the latest after so many seconds."""
        return bool(self._library.zeroinf_wait(self._pool, number, seconds))

    @property
    def seconds(self) -> float:
        """Seconds that steps have taken, waits for flags left out."""
        found: float = self._library.zeroinf_seconds(self._pool) if self._pool is not None else 0.0
        return found

    def read(self, memory: int, nbytes: int) -> int:
        """Read `nbytes` bytes at the address `memory` once."""
        found: int = self._library.zeroinf_read(self._pool, memory, nbytes)
        return found

    def clear(self, memory: int, nbytes: int) -> None:
        """Fill `nbytes` bytes at the address `memory` with zeros. Pages that nobody has touched come to lie on the
        NUMA nodes of the threads."""
        self._library.zeroinf_clear(self._pool, memory, nbytes)

    def close(self) -> None:
        """End the threads. In a process that was forked there are none."""
        if self._pool is not None and self._process == os.getpid():
            self._library.zeroinf_end_pool(self._pool)
        self._pool = None
