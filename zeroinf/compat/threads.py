"""Keeps torch's operators on the CPU to few threads beside a GPU (docs/decisions/0021-few-threads-beside-a-gpu.md)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_THREADS = 2
"""A larger team spins between its steps, which takes processors from the threads that launch kernels and read weights:
16 load an int4 model 1.6 times as slowly as 2, and a pass of recorded kernels takes the host 1.4 times as long."""


@contextmanager
def few_threads() -> Iterator[None]:
    """While it lasts, torch's operators of this thread, and of those to come, have two threads at the most."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(min(before, _THREADS))
    try:
        yield
    finally:
        torch.set_num_threads(before)
