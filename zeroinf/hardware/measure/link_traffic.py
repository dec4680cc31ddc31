"""Fills the link of a GPU with copies from page-locked memory, for what is measured beside them.

A thread makes a CUDA context of its own by the driver's interface, and destroys it: neither torch nor its context is
touched, and nothing stays on the GPU. So it may run before a plan, which counts what is free there.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Event, Thread

from zeroinf.errors import EnvironmentProblem

_COPIED_BYTES = 256 << 20
_TIMED_COPIES = 20
_COPIES_AHEAD = 2  # the link has the next one while the thread waits


@dataclass
class LinkTraffic:
    """Copies that follow each other over a link."""

    alone_gbps: float
    """The link's rate with nothing beside it."""
    copied_bytes: int = 0
    """What has been copied since."""


@contextmanager
def busy_link(device: int, library: str = "libcuda.so.1") -> Iterator[LinkTraffic]:
    """While it lasts, copies from host memory to the visible GPU `device` follow each other.

    Raises EnvironmentProblem where the driver refuses.
    """
    told, ends = SimpleQueue[LinkTraffic | EnvironmentProblem](), Event()

    def work() -> None:
        try:
            with ExitStack() as closing:
                copies = _Copies(device, library, closing)
                copies.run(1)  # the first one sets the driver up
                start = time.perf_counter()
                copies.run(_TIMED_COPIES)
                traffic = LinkTraffic(_TIMED_COPIES * _COPIED_BYTES / (time.perf_counter() - start) / 1e9)
                told.put(traffic)
                while not ends.is_set():
                    copies.run(_COPIES_AHEAD)
                    traffic.copied_bytes += _COPIES_AHEAD * _COPIED_BYTES
        except EnvironmentProblem as error:
            told.put(error)

    thread = Thread(target=work, name="copies over the link")
    thread.start()
    try:
        traffic = told.get()
        if isinstance(traffic, EnvironmentProblem):
            raise traffic
        yield traffic
    finally:
        ends.set()
        thread.join()
    if not told.empty():  # they ended before what was measured did
        problem = told.get()
        assert isinstance(problem, EnvironmentProblem)
        raise problem


class _Copies:
    """Memory on both sides of a link, in a context that is the calling thread's until `closing` ends it."""

    def __init__(self, device: int, library: str, closing: ExitStack) -> None:
        try:
            self._cuda = ctypes.CDLL(library)
        except OSError as error:
            raise EnvironmentProblem(f"the CUDA driver cannot be loaded: {error}") from error
        self._host, self._target = ctypes.c_void_p(), ctypes.c_uint64()
        number, context = ctypes.c_int(), ctypes.c_void_p()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(number), device)
        self._call("cuCtxCreate_v2", ctypes.byref(context), 0, number)
        closing.callback(self._cuda.cuCtxDestroy_v2, context)  # and with it its memory
        size = ctypes.c_size_t(_COPIED_BYTES)
        self._call("cuMemAllocHost_v2", ctypes.byref(self._host), size)
        self._call("cuMemAlloc_v2", ctypes.byref(self._target), size)
        ctypes.memset(self._host, 1, _COPIED_BYTES)

    def run(self, copies: int) -> None:
        """Copy so many times, and wait for it."""
        for _ in range(copies):
            size = ctypes.c_size_t(_COPIED_BYTES)
            self._call("cuMemcpyHtoDAsync_v2", self._target, self._host, size, None)
        self._call("cuCtxSynchronize")

    def _call(self, name: str, *arguments: object) -> None:
        try:
            code = int(getattr(self._cuda, name)(*arguments))
        except AttributeError as error:
            raise EnvironmentProblem(f"the CUDA driver has no {name}") from error
        if code:
            raise EnvironmentProblem(f"copies over the link cannot be made: {name} gives CUDA error {code}")
