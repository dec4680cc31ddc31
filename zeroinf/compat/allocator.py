"""Sets how torch's allocator of GPU memory works.

Relies on `torch._C._accelerator_setAllocatorSettings` (since torch 2.10; `torch.cuda.memory` calls it):
torch reads the variable PYTORCH_CUDA_ALLOC_CONF once, before a plan is known. Without it, plans would not replay the
allocator that runs. `tests/unit/test_compat.py` fails when it is gone.
"""

from __future__ import annotations

import torch


def set_allocator(settings: str) -> None:
    """Apply `settings`, in the form of PYTORCH_CUDA_ALLOC_CONF, to all memory that is allocated from now on."""
    torch._C._accelerator_setAllocatorSettings(settings)
