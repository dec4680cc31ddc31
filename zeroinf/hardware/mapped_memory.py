"""Maps host memory from the kernel, private or shared between processes."""

from __future__ import annotations

import mmap
from contextlib import suppress


def map_memory(nbytes: int, *, shared: bool = False, descriptor: int = -1) -> mmap.mmap:
    """`nbytes` of zeros that nobody has touched; `shared` with child processes, or all who map the file `descriptor`.

    In huge pages where the kernel has them, which as a rule is for private memory only.
    """
    if descriptor >= 0:
        memory = mmap.mmap(descriptor, nbytes)
    else:
        memory = mmap.mmap(-1, nbytes, flags=(mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE) | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without transparent huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
