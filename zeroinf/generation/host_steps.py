"""Decode steps of rows in host memory, for which the CPU attends where their keys and values rest.

Input: queries, new keys and values of a forward that holds nothing but steps. They cross to page-locked memory, a
thread hands them to the CPU's kernel, and the results cross back. Meanwhile the forward steps aside, so that the GPU
runs the others of that layer. Without a GPU the same happens without copies.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from zeroinf.compat.host_arrays import mapped
from zeroinf.engines.stream.lockstep import step_aside
from zeroinf.engines.stream.transfer import new_event
from zeroinf.generation.attention import MarkingLayer, Scores, Tokens, View
from zeroinf.generation.host_kernels import host_kernel
from zeroinf.generation.records import write
from zeroinf.generation.scheduler import Group
from zeroinf.hardware.host_library import attention_threads
from zeroinf.model.anatomy import Anatomy, HostSize, Record

_NUMBER_BYTES = 8
"""Results are read as whole numbers of so many bytes, whatever they hold."""


class HostSteps:
    """What steps of rows in host memory need: memory in which queries and results cross, a kernel, and a thread.

    Each forward of a pass has a part of the memory to itself, for all layers.
    """

    def __init__(self, anatomy: Anatomy, size: HostSize, device: torch.device, ranks: int) -> None:
        """`ranks` of this node share its processors."""
        self._row_bytes = anatomy.step_row_bytes(size)
        nbytes = size.cpu_rows * self._row_bytes
        is_meta, self.on_gpu = device.type == "meta", device.type == "cuda"
        self._host = torch.empty(0 if is_meta else nbytes, dtype=torch.uint8, pin_memory=self.on_gpu)
        self._device = torch.empty(nbytes, dtype=torch.uint8, device=device) if self.on_gpu or is_meta else self._host
        self._used = 0
        self._kernel = None if is_meta else host_kernel(attention_threads(ranks))
        self._worker = ThreadPoolExecutor(1, "attention-on-the-cpu")
        self._last: Future[None] | None = None
        self.waited_s = 0.0
        """Seconds that the host has waited for results, with nothing else to enqueue."""

    @property
    def pinned_bytes(self) -> int:
        """Page-locked memory; torch rounds it up to a power of two."""
        return 1 << (self._host.nbytes - 1).bit_length() if self.on_gpu else 0

    def begin(self) -> None:
        """The forwards of the next pass have their memory: those of the one after begin anew."""
        self._used = 0
        if self._last is not None:  # of a pass that broke
            self._last.exception()

    def take(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Memory for a forward of so many rows, on the host and on the device.

        Raises RuntimeError where a pass has more rows than were planned for.
        """
        start = self._used
        self._used = end = start + rows * self._row_bytes
        if end > self._device.numel():
            raise RuntimeError(f"steps of rows in host memory take {end} bytes, and {self._device.numel()} are there")
        return self._host[start:end], self._device[start:end]

    def submit(self, written: Any, given: Any, *work: Any) -> Future[None]:
        """Have the kernel do its `work` once the events `written` and `given` are over."""

        def attend() -> None:
            for event in (written, given):
                if event is not None:
                    event.synchronize()
            assert self._kernel is not None
            with torch.inference_mode():
                self._kernel(*work)

        self._last = self._worker.submit(attend)
        return self._last

    def wait(self, attended: Future[None]) -> None:
        """Wait for results; raises what the kernel raised."""
        start = time.perf_counter()
        attended.result()
        self.waited_s += time.perf_counter() - start

    def close(self) -> None:
        """End the threads, once they have done what they were given."""
        self._worker.shutdown()
        if self._kernel is not None:
            self._kernel.close()


class StepView(View):
    """The rows of a forward that holds steps alone, and its part of the memory."""

    def __init__(self, tokens: Tokens, group: Group, window: int | None) -> None:
        super().__init__(tokens, window)
        rows = []
        for seat, start in zip(group.seats, tokens.starts, strict=True):
            assert seat.host_start is not None
            first = self.first_seen(start)
            rows.append((seat.host_start + first, start + 1 - first))
        self.rows = torch.tensor(rows)
        """(rows, 2), int64: the first record that each row sees, and how many, the new one included."""


class StepLayer(MarkingLayer):
    """Rows attend on the CPU to the records that they have in `memory` (places, bytes), the new ones included."""

    def __init__(
        self,
        steps: HostSteps,
        record: Record,
        memory: torch.Tensor,
        view: StepView,
        room: tuple[torch.Tensor, torch.Tensor],
        written: Any,
    ) -> None:
        """`room`: the forward's memory, on the host and on the device. `written`: the event after which all that was
        sent to the layer's records is there; None where there is none."""
        super().__init__(view.window)
        self._steps, self._record, self._memory, self._view = steps, record, memory, view
        self._room, self._written = room, written

    def attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scores: Scores) -> torch.Tensor:
        """Attend as a kernel does."""
        steps, (host, device), rows = self._steps, self._room, query.shape[1]
        shapes = [(rows, query.shape[0], width) for width in (query.shape[2], values.shape[2])]
        sinks = 0 if scores.sinks is None else query.shape[0] * torch.float32.itemsize
        nbytes = [rows * self._record.nbytes, _nbytes(shapes[0], query.dtype), sinks, _nbytes(shapes[1], query.dtype)]
        parts, crossing = torch.split(device, [*nbytes, len(device) - sum(nbytes)]), sum(nbytes[:3])
        write(self._record, parts[0].view(1, rows, -1), keys[None], values[None])
        parts[1].view(query.dtype).view(shapes[0]).copy_(query.transpose(0, 1))
        if scores.sinks is not None:
            parts[2].view(torch.float32).copy_(scores.sinks)
        if device.device.type == "meta":
            return torch.empty(shapes[1], dtype=query.dtype, device="meta")
        given = None
        if steps.on_gpu:
            host[:crossing].copy_(device[:crossing], non_blocking=True)
            given = new_event(device.device)
            given.record()
        fresh, queries, held_sinks, out, _ = torch.split(host, [*nbytes, len(host) - sum(nbytes)])
        attended = steps.submit(
            self._written,
            given,
            self._record,
            self._memory,
            self._view.rows,
            fresh.view(rows, -1),
            queries.view(query.dtype).view(shapes[0]),
            out.view(query.dtype).view(shapes[1]),
            Scores(scores.scale, scores.softcap, held_sinks.view(torch.float32) if sinks else None),
        )
        step_aside()
        steps.wait(attended)
        return self._results(host, crossing, nbytes[3]).view(query.dtype).view(shapes[1])

    def _results(self, host: torch.Tensor, start: int, nbytes: int) -> torch.Tensor:
        """The results in `host`, which a GPU reads by a kernel: a copy would wait behind weights."""
        if not self._steps.on_gpu:
            return host[start : start + nbytes].clone()
        first, end = start // _NUMBER_BYTES * _NUMBER_BYTES, -(-(start + nbytes) // _NUMBER_BYTES) * _NUMBER_BYTES
        moved = mapped(host[first:end].view(torch.int64), self._room[1].device) + 0
        return moved.view(torch.uint8)[start - first :][:nbytes]


def _nbytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize
