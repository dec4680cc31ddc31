"""Decode steps of rows in host memory, for which the CPU attends where their keys and values rest.

Input: queries, new keys and values of a forward that holds nothing but steps. The GPU writes them to page-locked memory
and raises a flag, for which a thread of the CPU's kernel waits, and reads the results from there. Meanwhile the forward
steps aside, so that the GPU runs the others of that layer. Without a GPU the same happens on the CPU.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from zeroinf.compat.host_arrays import mapped
from zeroinf.engines.stream.lockstep import step_aside
from zeroinf.engines.stream.transfer import new_event
from zeroinf.generation.attention import MarkingLayer, Scores, Tokens, View
from zeroinf.generation.groups import Group
from zeroinf.generation.host_kernels import HostStep, host_kernel
from zeroinf.generation.records import write
from zeroinf.model.anatomy import Anatomy
from zeroinf.model.cache_layout import STEP_ALIGNMENT, HostSize, Record

_LOOK_S = 1.0
"""So often the GPU is asked whether it is well while results do not come."""


class HostSteps:
    """What steps of rows in host memory need: memory that GPU and CPU write in turn, and a kernel.

    Each forward of a pass has a part of the memory to itself, for all layers.
    """

    def __init__(self, anatomy: Anatomy, size: HostSize, device: torch.device, processors: Sequence[int]) -> None:
        """`processors`: those that attend, by their numbers."""
        self._row_bytes = anatomy.step_row_bytes(size)
        nbytes = size.cpu_rows * self._row_bytes
        self._on_gpu = on_gpu = device.type == "cuda"
        self._device = self._host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=on_gpu)
        self._raised = self._flag = torch.zeros(1, dtype=torch.int64, pin_memory=on_gpu)
        if on_gpu:
            self._device = mapped(self._host.view(torch.int64), device).view(torch.uint8)
            self._raised = mapped(self._flag, device)
        self._used = 0
        self._kernel = host_kernel(processors)
        self._given = new_event(device)
        self._last = 0
        self.waited_s = 0.0
        """Seconds that the host has waited for results, with nothing else to enqueue."""

    @property
    def pinned_bytes(self) -> int:
        """Page-locked memory; torch rounds it up to a power of two."""
        return 1 << (self._host.nbytes - 1).bit_length() if self._on_gpu else 0

    @property
    def seconds(self) -> float:
        """Seconds that the CPU has attended."""
        return self._kernel.seconds

    def clear(self, memory: torch.Tensor) -> None:
        """Fill `memory`, which nobody has touched, with zeros: it comes to lie near the processors that attend."""
        self._kernel.clear(memory)

    def begin(self) -> None:
        """The forwards of the next pass have their memory: those of the one after begin anew."""
        self._used = 0
        if self._last and not self._kernel.wait(self._last, 0):  # a pass broke, perhaps before it raised the flag
            self._raised.fill_(self._last)
            self.wait(self._last)

    def take(self, rows: int) -> StepRoom:
        """Memory for a forward of so many rows.

        Raises RuntimeError where a pass has more rows than were planned for.
        """
        start = self._used
        self._used = end = start + rows * self._row_bytes
        if end > self._device.numel():
            raise RuntimeError(f"steps of rows in host memory take {end} bytes, and {self._device.numel()} are there")
        return StepRoom(self._host[start:end], self._device[start:end])

    def submit(self, step: HostStep, memory: torch.Tensor, rows: torch.Tensor, written: Any) -> int:
        """Have the kernel attend once all is over that the GPU was given so far, and the event `written`. Returns the
        step's number."""
        self._last = self._kernel.submit(step, memory, rows, self._flag)  # its threads wake up meanwhile
        if self._on_gpu:
            torch.cuda.current_stream(self._raised.device).wait_event(written)
        self._raised.fill_(self._last)
        if self._given is not None:
            self._given.record()
        return self._last

    def wait(self, number: int) -> None:
        """Wait for results; raises what the kernel raised, or the GPU."""
        start = time.perf_counter()
        while not self._kernel.wait(number, _LOOK_S):
            if self._given is not None:
                self._given.query()
        self.waited_s += time.perf_counter() - start

    def close(self) -> None:
        """End the threads; what they have not begun is left out."""
        self._kernel.close()


class StepView(View):
    """The rows of a forward that holds steps alone."""

    def __init__(self, tokens: Tokens, group: Group, window: int | None) -> None:
        super().__init__(tokens, window)
        rows = []
        for seat, start in zip(group.seats, tokens.starts, strict=True):
            assert seat.host_start is not None
            first = self.first_seen(start)
            rows.append((seat.host_start + first, start + 1 - first))
        self.rows = torch.tensor(rows)
        """(rows, 2), int64: the first record that each row sees, and how many, the new one included."""


@dataclass(frozen=True, slots=True)
class _Shared:
    """The parts of a forward's memory in layers that are alike: as the GPU sees them, and as the kernel does."""

    fresh: torch.Tensor
    query: torch.Tensor
    sinks: torch.Tensor
    numbers: torch.Tensor
    """The results and what comes behind them, int64."""
    step: HostStep


class StepRoom:
    """A forward's part of the memory, in which results come first."""

    def __init__(self, host: torch.Tensor, device: torch.Tensor) -> None:
        """Both (bytes,), uint8: the same memory as the CPU sees it, and as the GPU does."""
        self._host, self._device = host, device
        self._shared: dict[Any, _Shared] = {}

    def shared(self, record: Record, query: torch.Tensor, values: torch.Tensor, scores: Scores) -> _Shared:
        """The parts for layers whose queries (heads, rows, width) and values are like these."""
        has_sinks = scores.sinks is not None
        key = record, query.shape, query.dtype, values.shape[2], scores.scale, scores.softcap, has_sinks
        if key not in self._shared:
            self._shared[key] = self._made(record, query, values.shape[2], scores)
        return self._shared[key]

    def _made(self, record: Record, query: torch.Tensor, value_width: int, scores: Scores) -> _Shared:
        heads, rows, width = query.shape
        shapes, dtype = [(rows, heads, value_width), (rows, heads, width)], query.dtype
        results, queries = (torch.Size(shape).numel() * dtype.itemsize for shape in shapes)
        sinks = 0 if scores.sinks is None else heads * torch.float32.itemsize
        sizes = [-(-results // STEP_ALIGNMENT) * STEP_ALIGNMENT, sinks, rows * record.nbytes, queries]
        host, device = (torch.split(of, [*sizes, len(of) - sum(sizes)]) for of in (self._host, self._device))
        held = None if scores.sinks is None else host[1].view(torch.float32)
        return _Shared(
            fresh=device[2].view(1, rows, -1),
            query=device[3].view(dtype).view(shapes[1]),
            sinks=device[1].view(torch.float32),
            numbers=device[0].view(torch.int64),
            step=HostStep(
                record=record,
                fresh=host[2].view(rows, -1),
                query=host[3].view(dtype).view(shapes[1]),
                out=host[0][:results].view(dtype).view(shapes[0]),
                scores=Scores(scores.scale, scores.softcap, held),
            ),
        )


class StepLayer(MarkingLayer):
    """Rows attend on the CPU to the records that they have in `memory` (places, bytes), the new ones included."""

    def __init__(
        self, steps: HostSteps, record: Record, memory: torch.Tensor, view: StepView, room: StepRoom, written: Any
    ) -> None:
        """`written`: the event after which all that was sent to the layer's records is there; None where there is
        none."""
        super().__init__(view.window)
        self._steps, self._record, self._memory, self._view = steps, record, memory, view
        self._room, self._written = room, written

    def attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scores: Scores) -> torch.Tensor:
        """Attend as a kernel does."""
        steps, shared = self._steps, self._room.shared(self._record, query, values, scores)
        write(self._record, shared.fresh, keys[None], values[None])
        shared.query.copy_(query.transpose(0, 1))
        if scores.sinks is not None:
            shared.sinks.copy_(scores.sinks)
        number = steps.submit(shared.step, self._memory, self._view.rows, self._written)
        step_aside()
        steps.wait(number)
        shape, moved = shared.step.out.shape, shared.numbers + 0  # by a kernel: a copy would wait behind weights
        return moved.view(query.dtype)[: shape.numel()].view(shape)
