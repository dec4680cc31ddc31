"""Allocates host memory of exactly the requested size, page-locked for the GPU, for one process or for all ranks of a
node.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from zeroinf.distributed.control import Control
from zeroinf.errors import EnvironmentProblem
from zeroinf.hardware.mapped_memory import map_memory
from zeroinf.hardware.numa import gpu_node, prefer_nodes
from zeroinf.hardware.snapshot import read_memlock
from zeroinf.sizes import gib

_PORTABLE = 1  # cudaHostRegisterPortable: locked for every CUDA context of the process
_MEMORY = "zeroinf-weights"


class HostMemory:
    """`nbytes` of memory, page-locked at exactly that size if `pin`.

    torch's `pin_memory` rounds each allocation up to a power of two; mapping and registering does not. With a `control`
    all ranks of a node map the same memory, if there are several: they fill it first, and call `pin` then. It has no
    name in any file system: it is gone with the last process that maps it, however that one ends. If
    `near_gpu`, its pages come to lie on the NUMA node of the calling thread's GPU, or by turns on those of the ranks
    that share it, where the kernel tells and the user has not bound the process elsewhere; else where threads are that
    fill it.
    """

    def __init__(self, nbytes: int, control: Control | None = None, *, pin: bool, near_gpu: bool = True) -> None:
        self.nbytes = nbytes
        self.pinned_bytes = 0
        if control is None or control.world.local_size == 1:
            self._map, nodes = map_memory(nbytes), [_gpu_node()]
        else:
            descriptor, nodes = self._open(nbytes, control)
            self._map = map_memory(nbytes, descriptor=descriptor)
            os.close(descriptor)
        if near_gpu:
            prefer_nodes(self._map, {node for node in nodes if node is not None})
        self.bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        if pin:
            self.bytes.zero_()  # by all threads of torch: the driver would have one of them make the pages
            self.pin()

    @staticmethod
    def _open(nbytes: int, control: Control) -> tuple[int, list[int | None]]:
        """The memory's descriptor, and the NUMA nodes of the GPUs of the ranks that share it."""
        own = os.memfd_create(_MEMORY) if control.world.local_rank == 0 else -1
        if own >= 0:
            os.ftruncate(own, nbytes)
        # By rank, not by a host's name: nodes that were cloned may have the same.
        first = control.world.rank - control.world.local_rank
        told = control.all_gather((os.getpid(), own, _gpu_node()))[first : first + control.world.local_size]
        pid, number, _ = told[0]
        descriptor = own if own >= 0 else _opened(pid, number)
        control.all_gather(None)  # nobody closes it before all have opened it
        return descriptor, [node for _, _, node in told]

    def pin(self) -> None:
        """Lock the memory for the GPU. Raises EnvironmentProblem where the driver refuses."""
        error = _cudart().cudaHostRegister(self.bytes.data_ptr(), self.nbytes, _PORTABLE)
        if int(error):
            limit = read_memlock()
            low = limit is not None and limit < self.nbytes
            raise EnvironmentProblem(
                f"cannot page-lock {gib(self.nbytes)} of host memory: CUDA error {int(error)}"
                + (f", the memlock limit is {gib(limit)}" if limit is not None else ""),
                hint=(f"ulimit -l {-(-self.nbytes // 1024)} or more, " if low else "free host memory, ")
                + "or --no-pin-memory",
            )
        self.pinned_bytes = self.nbytes

    def close(self) -> None:
        """Unlock the memory. The mapping goes with the last tensor that points into it."""
        if self.pinned_bytes:
            _cudart().cudaHostUnregister(self.bytes.data_ptr())
            self.pinned_bytes = 0


def _gpu_node() -> int | None:
    return gpu_node(torch.cuda.current_device()) if _has_cuda() else None


def _opened(pid: int, number: int) -> int:
    """The memory that another rank of this node has made."""
    try:
        descriptor = os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR)
        if _MEMORY in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            return descriptor
        os.close(descriptor)
    except OSError:
        pass
    raise EnvironmentProblem(
        "ranks of one node cannot see each other's processes, so they cannot share host memory",
        hint="start them in one container, or as one node each (LOCAL_RANK=0, LOCAL_WORLD_SIZE=1)",
    )


def view_of(memory: torch.Tensor) -> memoryview:
    """The bytes of `memory` (uint8, contiguous, on the CPU), for system calls to read and write."""
    return memoryview(memory.numpy())  # type: ignore[arg-type]  # numpy's arrays are buffers, its types do not say so


def _has_cuda() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
