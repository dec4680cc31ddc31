"""Sets how torch's allocator of GPU memory works, and gives the caller's settings back.

Relies on `torch._C._accelerator_setAllocatorSettings` (since torch 2.10; `torch.cuda.memory` calls it):
torch reads the variable PYTORCH_CUDA_ALLOC_CONF once, before a plan is known. Without it, plans would not replay the
allocator that runs. `tests/unit/test_compat.py` fails when it is gone. Not every supported torch tells its settings, so
those given back are those of the environment.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from threading import Lock

import torch

_SEGMENTS = "expandable_segments"
_lock = Lock()
_users = 0


def set_allocator(settings: str) -> None:
    """Apply `settings`, in the form of PYTORCH_CUDA_ALLOC_CONF, to all memory that is allocated from now on."""
    torch._C._accelerator_setAllocatorSettings(settings)


def environment_settings(environ: Mapping[str, str]) -> str:
    """The allocator settings that torch took from `environ` when it was loaded, with expandable segments named either
    way."""
    # PYTORCH_ALLOC_CONF wins over its older name (pytorch, c10/core/AllocatorConfig.h).
    settings = environ.get("PYTORCH_ALLOC_CONF", environ.get("PYTORCH_CUDA_ALLOC_CONF", "")).strip(" ,")
    if _SEGMENTS in settings:
        return settings
    return ",".join(filter(None, (settings, f"{_SEGMENTS}:False")))


@contextmanager
def expandable_segments() -> Iterator[None]:
    """Let segments grow, until the last of those who want it at the same time has ended."""
    global _users
    with _lock:
        _users += 1
        set_allocator(f"{_SEGMENTS}:True")
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                set_allocator(environment_settings(os.environ))
