"""Reads rows of a matrix from the files of its checkpoint, where they lie as they are, without loading the matrix.

Input: numbers of rows. Output: these rows, each once. The files are mapped and read a page at a time by many threads,
so that a disk has many requests at once; what is read again comes from the system's page cache, which takes no more
memory than nobody else needs.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zeroinf.errors import ModelError
from zeroinf.hardware.disk import PAGE_READERS
from zeroinf.model.mapped_files import data_offsets
from zeroinf.model.source import StoredRows

_FEWEST = 16
"""Rows that a thread reads, at the least: fewer take less time than to hand them over."""


class RowFiles:
    """Reads rows of matrices, by the names of these, each from where its `StoredRows` say."""

    def __init__(self, matrices: Mapping[str, Sequence[StoredRows]]) -> None:
        """Map the files. Raises ModelError for one that cannot be opened, or is shorter than its header says."""
        self._pool = ThreadPoolExecutor(PAGE_READERS, "row-files")
        self.rows_read = 0
        """Rows that forwards have asked for, each once a forward."""
        self.read_s = 0.0
        mapped, offsets = cache(_mapped), cache(data_offsets)
        self._parts: dict[str, list[np.ndarray[Any, Any]]] = {}
        self._starts: dict[str, np.ndarray[Any, Any]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        for name, rows in matrices.items():
            self._dtypes[name] = getattr(torch, rows[0].dtype)
            self._parts[name] = [_rows_of(part, mapped(part.file), offsets(part.file)[part.name]) for part in rows]
            self._starts[name] = np.cumsum([0, *(part.rows for part in rows)])

    def read(self, name: str, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the rows `numbers` (int64, one dimension) of the matrix `name` each once, in its dtype on the disk: (rows,
        width); and where each of `numbers` lies among them. Raises IndexError for a number that is none."""
        started = time.perf_counter()
        wanted, places = np.unique(numbers.numpy(), return_inverse=True)
        parts, starts = self._parts[name], self._starts[name]
        if len(wanted) and not 0 <= wanted[0] <= wanted[-1] < starts[-1]:
            raise IndexError(f"{name} has {starts[-1]} rows, asked for are {wanted[0]} to {wanted[-1]}")
        dtype = self._dtypes[name]
        rows = torch.empty(len(wanted), parts[0].shape[1] // dtype.itemsize, dtype=dtype)
        found = rows.view(torch.uint8).numpy()
        ends = np.searchsorted(wanted, starts)  # numbers in order are those of one part after the other

        def read_some(first: int, end: int) -> None:
            at = int(np.searchsorted(ends, first, side="right")) - 1
            while first < end:
                last = min(end, int(ends[at + 1]))
                # Without a check of its own, which was made above, numpy copies straight into `found`.
                np.take(parts[at], wanted[first:last] - starts[at], 0, found[first:last], mode="clip")
                first, at = last, at + 1

        each = max(_FEWEST, -(-len(wanted) // PAGE_READERS))
        list(self._pool.map(lambda some: read_some(*some), pairwise([*range(0, len(wanted), each), len(wanted)])))
        self.rows_read += len(wanted)
        self.read_s += time.perf_counter() - started
        return rows, torch.from_numpy(places.reshape(-1))

    def close(self) -> None:
        """End the threads. Files stay mapped as long as a forward needs them."""
        self._pool.shutdown()


def _mapped(file: Path) -> mmap.mmap:
    try:
        with file.open("rb") as opened:
            memory = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read rows of {file}: {error}", hint="fetch the file again") from error
    memory.madvise(mmap.MADV_RANDOM)  # else the system would read 32 pages for each
    return memory


def _rows_of(part: StoredRows, memory: mmap.mmap, place: tuple[int, int]) -> np.ndarray[Any, Any]:
    """The rows of `part` (rows, bytes), which lie at the bytes `place` of its file, mapped to `memory`."""
    start, end = place
    if end > len(memory):
        raise ModelError(f"{part.file} ends before the data of {part.name}", hint="fetch the file again")
    return np.frombuffer(memory, np.uint8, end - start, start).reshape(part.rows, -1)
