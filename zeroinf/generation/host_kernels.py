"""Attention of decode steps on the CPU over records that rest in host memory.

Input: a layer's records, the rows that have one new token each, that token's record, and queries. Output: what each
query attends to. One kernel is compiled (`zeroinf.hardware.host_library`); the other one is torch's, for machines
without a compiler, and what tests compare it with.
"""

from __future__ import annotations

from typing import Protocol

import torch

from zeroinf.generation.attention import Scores, attend_row
from zeroinf.generation.records import read
from zeroinf.hardware.host_library import HostLayout, ThreadPool, why_no_host_kernel
from zeroinf.model.anatomy import Record

_KINDS = {"bfloat16": 0, "float16": 1, "float32": 2, "int8": 3}


class HostKernel(Protocol):
    """Puts new records into their places and attends."""

    def __call__(
        self,
        record: Record,
        memory: torch.Tensor,
        rows: torch.Tensor,
        fresh: torch.Tensor,
        query: torch.Tensor,
        out: torch.Tensor,
        scores: Scores,
    ) -> None:
        """memory: (places, bytes), uint8, the layer's records. rows: (rows, 2), int64: the place of the first record
        that a row's query sees, and how many it sees, of which the last one is new. fresh: (rows, bytes), uint8, the
        new records. query: (rows, heads, width) and out: (rows, heads, width of values), in the model's dtype. Sinks
        are float32. All on the CPU and contiguous.
        """
        ...


class CompiledKernel:
    """The compiled kernel with threads of its own. Raises EnvironmentProblem where it cannot be compiled."""

    def __init__(self, threads: int, machine: str = "native") -> None:
        self._pool = ThreadPool(threads, machine)

    def __call__(
        self,
        record: Record,
        memory: torch.Tensor,
        rows: torch.Tensor,
        fresh: torch.Tensor,
        query: torch.Tensor,
        out: torch.Tensor,
        scores: Scores,
    ) -> None:
        heads = record.keys.heads
        layout = HostLayout(
            record.nbytes,
            *record.starts[:4],
            heads,
            query.shape[1] // heads,
            record.keys.width,
            record.values.width,
            _KINDS["int8" if record.dtype == "int8" else record.keys.dtype],
            _KINDS[str(query.dtype).removeprefix("torch.")],
            scores.scale,
            scores.softcap or 0.0,
            None if scores.sinks is None else scores.sinks.data_ptr(),
        )
        self._pool.attend(
            layout, rows.data_ptr(), len(rows), *(each.data_ptr() for each in (memory, fresh, query, out))
        )

    def close(self) -> None:
        """End its threads."""
        self._pool.close()


class TorchKernel:
    """torch's own operators, row by row, with its own threads."""

    def __call__(
        self,
        record: Record,
        memory: torch.Tensor,
        rows: torch.Tensor,
        fresh: torch.Tensor,
        query: torch.Tensor,
        out: torch.Tensor,
        scores: Scores,
    ) -> None:
        for row, (first, count) in enumerate(rows.tolist()):
            held = memory[first : first + count]
            held[-1] = fresh[row]
            keys, values = (each[0] for each in read(record, held[None]))
            out[row] = attend_row(query[row, :, None], keys, values, None, scores)[:, 0]

    def close(self) -> None:
        """Nothing of it outlives a call."""


def host_kernel(threads: int) -> CompiledKernel | TorchKernel:
    """The compiled kernel, or torch's where there is no compiler. Raises EnvironmentProblem where compiling fails."""
    return TorchKernel() if why_no_host_kernel() else CompiledKernel(threads)
