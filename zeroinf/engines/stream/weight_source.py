"""The interface of everything that fills memory with weights, and a thread-safe counter of loading progress."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

Pieces = Sequence[tuple[int, torch.Tensor]]
"""Numbers of groups, each with the memory (uint8) that its piece shall lie in."""


class WeightSource(Protocol):
    """Fills pieces of memory with weights: a checkpoint, or a store that was written from one."""

    def fill(self, pieces: Pieces) -> None:
        """Write this rank's part of each piece; together the ranks of a node write all of it."""
        ...


class LoadProgress:
    """A thread-safe counter of loaded bytes that calls `on_progress(done, total)` from time to time."""

    def __init__(self, total: int, on_progress: Callable[[int, int], None]) -> None:
        self._total = total
        self._on_progress = on_progress
        self._done = 0
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            self._on_progress(min(self._done, self._total), self._total)
