"""Captures CUDA graphs so that a capture which fails leaves torch as it was.

`torch.cuda.CUDAGraph.capture_end` raises where the driver has given a capture up, and then neither takes its memory
pool out of the allocator's captures nor tells the random number generator that the capture is over. Relies on
`torch._C._cuda_endAllocateToPool` (torch.cuda.memory calls it). `tests/gpu/test_graphs_on_the_gpu.py` fails when it is
gone.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

_WAITS = "called a synchronizing CUDA operation"
_PROTOTYPE = "Synchronization debug mode is a prototype feature"


class CudaCapture:
    """One graph of what is launched on the current stream of this thread, whatever other threads do meanwhile."""

    def __init__(self, device: torch.device, stream: Any, pool: Any) -> None:
        """`stream`: where it is captured. `pool`: the memory pool in which it computes."""
        self._graph = torch.cuda.CUDAGraph()
        self._device, self._on, self._pool = device, torch.cuda.stream(stream), pool
        self._has_begun = False

    def begin(self) -> None:
        """Record from now on what is launched."""
        self._on.__enter__()  # type: ignore[no-untyped-call]
        try:
            self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        except BaseException:
            self._on.__exit__(None, None, None)
            raise
        self._has_begun = True

    def end(self) -> None:
        """End what has begun, if anything has. Raises RuntimeError where it cannot be replayed."""
        if not self._has_begun:
            return
        self._has_begun = False
        try:
            self._graph.capture_end()
        except RuntimeError:
            self._give_up()
            raise
        finally:
            self._on.__exit__(None, None, None)

    def replay(self) -> None:
        """Run it on the current stream."""
        self._graph.replay()

    def _give_up(self) -> None:
        with suppress(RuntimeError):  # it may have come so far
            torch._C._cuda_endAllocateToPool(self._device.index, self._pool)
        generator = torch.cuda.default_generators[self._device.index]
        fresh = torch.Generator(self._device)
        fresh.set_state(generator.get_state())
        generator.graphsafe_set_state(fresh.graphsafe_get_state())


@contextmanager
def noting_waits() -> Iterator[list[str]]:
    """While it lasts, operators of torch that wait for the GPU are noted."""
    found: list[str] = []
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(before)
            if any(_WAITS in str(each.message) for each in caught):
                found.append("a layer waits for the GPU")
    for each in caught:
        if not any(own in str(each.message) for own in (_WAITS, _PROTOTYPE)):
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)


@contextmanager
def ignoring_waits() -> Iterator[None]:
    """While it lasts, no operator is noted."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("default")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
