"""Lets kernels of a GPU read and write page-locked host memory in place.

Relies on torch taking the CUDA array interface (version 3, since torch 1.1) of memory that is the host's, though it is
meant for a GPU's own: CUDA's unified addressing gives page-locked memory the same address on the GPU, and torch asks
the driver where an address lies. Without it, small copies would wait behind weights in the copy queue.
`tests/gpu/test_upload.py` fails when it changes.
"""

from __future__ import annotations

from typing import Any

import torch

_TYPES = {torch.int64: "<i8", torch.float32: "<f4"}


def mapped(pinned: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`pinned` (page-locked, contiguous; int64 or float32) as a tensor of the GPU `device` in the same memory.

    Kernels read and write it over the link; it must live until they have.
    """
    return torch.as_tensor(_Mapped(pinned), device=device)


class _Mapped:
    def __init__(self, pinned: torch.Tensor) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": tuple(pinned.shape),
            "typestr": _TYPES[pinned.dtype],
            "data": (pinned.data_ptr(), False),
            "version": 3,
        }
