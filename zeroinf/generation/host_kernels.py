"""Attention of decode steps on the CPU over records that rest in host memory.

Input: a layer's records, the rows that have one new token each, that token's record, and queries. Output: what each
query attends to. One kernel is compiled (`zeroinf.hardware.host_library`); the other one is torch's, for machines
without a compiler, and what tests compare it with.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch

from zeroinf.generation.attention import Scores, attend_row
from zeroinf.generation.records import read
from zeroinf.hardware.host_library import HostLayout, ThreadPool, why_no_host_kernel
from zeroinf.model.cache_layout import Record

_KINDS = {"bfloat16": 0, "float16": 1, "float32": 2, "int8": 3}
_LOOK_AGAIN_S = 1e-4


@dataclass(frozen=True, kw_only=True, eq=False)
class HostStep:
    """The memory of a step of some rows in one layer, all on the CPU and contiguous; the same serves many layers."""

    record: Record
    fresh: torch.Tensor
    """(rows, bytes), uint8: the new records."""
    query: torch.Tensor
    """(rows, heads, width), in the model's dtype."""
    out: torch.Tensor
    """(rows, heads, width of values), in the model's dtype."""
    scores: Scores
    """Sinks are float32."""

    @cached_property
    def layout(self) -> HostLayout:
        """As the compiled kernel takes it."""
        record, scores, heads = self.record, self.scores, self.record.keys.heads
        return HostLayout(
            record.nbytes,
            *record.starts[:4],
            heads,
            self.query.shape[1] // heads,
            record.keys.width,
            record.values.width,
            _KINDS["int8" if record.dtype == "int8" else record.keys.dtype],
            _KINDS[str(self.query.dtype).removeprefix("torch.")],
            scores.scale,
            scores.softcap or 0.0,
            None if scores.sinks is None else scores.sinks.data_ptr(),
        )

    @cached_property
    def addresses(self) -> tuple[int, int, int]:
        """Of new records, queries and results."""
        return self.fresh.data_ptr(), self.query.data_ptr(), self.out.data_ptr()


class HostKernel(Protocol):
    """Puts new records into their places and attends, one step after the other."""

    def submit(self, step: HostStep, memory: torch.Tensor, rows: torch.Tensor, flag: torch.Tensor | None) -> int:
        """Begin a step, and return its number: they count from 1. It waits until `flag`, if there is one (1,), int64,
        has that number at least. All that is given must live until the step is over.

        memory: (places, bytes), uint8, the layer's records. rows: (rows, 2), int64: the place of the first record that
        a row's query sees, and how many it sees, of which the last one is new. On the CPU and contiguous.
        """
        ...

    def wait(self, number: int, seconds: float) -> bool:
        """Whether the step of that number is over, at the latest after so many seconds. Raises what it has raised."""
        ...

    def clear(self, memory: torch.Tensor) -> None:
        """Fill `memory` with zeros, so that what nobody has touched comes to lie near the threads."""
        ...

    @property
    def seconds(self) -> float:
        """Seconds that steps have taken, waits for flags left out."""
        ...

    def close(self) -> None:
        """End its threads; steps that have not begun are left out."""
        ...


class CompiledKernel:
    """The compiled kernel with threads of its own: so many, or one for each of some processors. Raises
    EnvironmentProblem where it cannot be compiled."""

    def __init__(self, threads: int | Sequence[int], machine: str = "native") -> None:
        self._pool = ThreadPool(threads, machine)

    def submit(self, step: HostStep, memory: torch.Tensor, rows: torch.Tensor, flag: torch.Tensor | None) -> int:
        at = None if flag is None else flag.data_ptr()
        return self._pool.submit(step.layout, rows.data_ptr(), len(rows), memory.data_ptr(), *step.addresses, at)

    def wait(self, number: int, seconds: float) -> bool:
        return self._pool.wait(number, seconds)

    def clear(self, memory: torch.Tensor) -> None:
        self._pool.clear(memory.data_ptr(), memory.nbytes)

    @property
    def seconds(self) -> float:
        return self._pool.seconds

    def close(self) -> None:
        self._pool.close()


class TorchKernel:
    """torch's own operators, row by row, with `threads` threads of its own."""

    def __init__(self, threads: int = 1) -> None:
        self._worker = ThreadPoolExecutor(1, "attention-on-the-cpu", torch.set_num_threads, (threads,))
        self._steps: list[Future[None]] = []
        self._ends = False
        self.seconds = 0.0

    def submit(self, step: HostStep, memory: torch.Tensor, rows: torch.Tensor, flag: torch.Tensor | None) -> int:
        number = len(self._steps) + 1
        self._steps.append(self._worker.submit(self._attend, number, step, memory, rows, flag))
        return number

    def _attend(
        self, number: int, step: HostStep, memory: torch.Tensor, rows: torch.Tensor, flag: torch.Tensor | None
    ) -> None:
        while flag is not None and int(flag) < number:
            if self._ends:
                return
            time.sleep(_LOOK_AGAIN_S)
        start = time.perf_counter()
        with torch.inference_mode():
            for row, (first, count) in enumerate(rows.tolist()):
                held = memory[first : first + count]
                held[-1] = step.fresh[row]
                keys, values = (each[0] for each in read(step.record, held[None]))
                step.out[row] = attend_row(step.query[row, :, None], keys, values, None, step.scores)[:, 0]
        self.seconds += time.perf_counter() - start

    def wait(self, number: int, seconds: float) -> bool:
        try:
            self._steps[number - 1].result(seconds)
        except TimeoutError:
            return False
        return True

    def clear(self, memory: torch.Tensor) -> None:
        memory.zero_()

    def close(self) -> None:
        self._ends = True
        self._worker.shutdown(cancel_futures=True)


def host_kernel(processors: Sequence[int]) -> CompiledKernel | TorchKernel:
    """The compiled kernel on `processors`, or torch's where there is no compiler. Raises EnvironmentProblem where
    compiling fails."""
    return TorchKernel(len(processors)) if why_no_host_kernel() else CompiledKernel(processors)
