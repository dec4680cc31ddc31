"""Copies of a block's weights from host memory into a device slot, either whole over this rank's link or in parts over
the links of all ranks, joined by an all-gather.

Input: this rank's bytes of a piece in page-locked memory, and CUDA events that order the copy. It knows neither tensors
nor layers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist

from zeroinf.planner.memory import STAGES, round_up

# Releases of torch call it one name or the other.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

# How many copies may be unread before those that are over are read: a pass or so.
_UNREAD = 96


class LinkMeter:
    """Adds up the seconds that copies take from their first byte to their last, without making the host wait.

    A link that is in use all the time at less than its rate is slowed, such as by processors that read the same memory;
    one that reaches its rate for a part of the time waits for the host or for a free slot.
    """

    def __init__(self, device: torch.device, stream: Any) -> None:
        """`stream`: that of the copies; None, on the CPU, where nothing crosses a link."""
        self._device, self._stream = device, stream
        self._copies: deque[tuple[Any, Any]] = deque()
        self._spare: list[Any] = []
        self._seconds = 0.0

    @contextmanager
    def copying(self) -> Iterator[None]:
        """The copy enqueued inside is counted from when all that it waits for has happened."""
        first = self._record()
        yield
        self._copies.append((first, self._record()))
        if len(self._copies) > _UNREAD:
            self.seconds()

    def seconds(self) -> float:
        """Of all copies that are over."""
        while self._copies and self._copies[0][1].query():
            first, last = self._copies.popleft()
            self._seconds += first.elapsed_time(last) / 1e3
            self._spare += first, last
        return self._seconds

    def _record(self) -> Any:
        event = self._spare.pop() if self._spare else new_event(self._device, timed=True)
        event.record(self._stream)
        return event


class WeightTransfer(Protocol):
    """Copies pieces to the device in the order in which `transfer` is called."""

    in_step: bool
    """Whether all ranks must transfer the same pieces in the same order."""
    stream: Any
    """The CUDA stream of the copies over this rank's link; None on the CPU."""
    meter: LinkMeter
    """Of these copies."""

    def span(self, nbytes: int) -> slice:
        """The bytes of a piece of `nbytes` that this rank pulls."""
        ...

    def slot_bytes(self, nbytes: int) -> int:
        """Bytes that a piece of `nbytes` takes in a slot."""
        ...

    def transfer(
        self, src: torch.Tensor, nbytes: int, slot: torch.Tensor, slot_free: Any, ready: Any, src_consumed: Any
    ) -> None:
        """Copy a piece of `nbytes` bytes into `slot` (uint8, on the device) without making the host wait.

        `src` (uint8, in host memory) is this rank's `span` of the piece. The copy waits for the event `slot_free`,
        records `src_consumed` once `src` may be overwritten, and `ready` once the whole piece is in the slot. On the
        CPU the events are None and the piece is in the slot on return.
        """
        ...


class ReplicatedTransfer:
    """Each rank pulls every piece over its own link. Ranks need nothing of each other."""

    in_step = False

    def __init__(self, device: torch.device) -> None:
        self.stream = new_stream(device)
        self.meter = LinkMeter(device, self.stream)

    def span(self, nbytes: int) -> slice:
        return slice(0, nbytes)

    def slot_bytes(self, nbytes: int) -> int:
        return nbytes

    def transfer(
        self, src: torch.Tensor, nbytes: int, slot: torch.Tensor, slot_free: Any, ready: Any, src_consumed: Any
    ) -> None:
        if self.stream is None:
            slot[:nbytes].copy_(src)
            return
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(slot_free)
            with self.meter.copying():
                slot[:nbytes].copy_(src, non_blocking=True)
            src_consumed.record(self.stream)
            ready.record(self.stream)


class PartitionedTransfer:
    """Each rank pulls 1/n over its own link, and an all-gather over the links between GPUs makes the piece whole.

    n ranks use n links for one walk over the weights. The part of the next piece crosses the link while the current
    one is gathered: each step has a stream of its own, with a ring of small stages between them. Every rank must carry
    the same pieces. Parts are multiples of `unit` bytes; the last one may be short, and what a gather brings of it
    beyond the piece's end is never read.
    """

    in_step = True

    def __init__(self, device: torch.device, rank: int, ranks: int, largest_piece: int, unit: int) -> None:
        self._rank, self._ranks, self._unit = rank, ranks, unit
        self.stream, self._gather = new_stream(device), new_stream(device)
        self.meter = LinkMeter(device, self.stream)
        part = self._part(largest_piece)
        self._stages = [torch.empty(part, dtype=torch.uint8, device=device) for _ in range(STAGES)]
        self._staged = [new_event(device) for _ in range(STAGES)]
        self._free = [new_event(device) for _ in range(STAGES)]
        self._turn = 0
        for event in self._free:  # the stages' memory may still be in use by what loading has enqueued
            ComputeStream(device).record(event)

    def _part(self, nbytes: int) -> int:
        return round_up(-(-nbytes // self._ranks), self._unit)

    def span(self, nbytes: int) -> slice:
        start = self._rank * self._part(nbytes)
        return slice(min(start, nbytes), min(start + self._part(nbytes), nbytes))

    def slot_bytes(self, nbytes: int) -> int:
        return self._ranks * self._part(nbytes)

    def transfer(
        self, src: torch.Tensor, nbytes: int, slot: torch.Tensor, slot_free: Any, ready: Any, src_consumed: Any
    ) -> None:
        at = self._turn % STAGES
        self._turn += 1
        stage, whole = self._stages[at][: self._part(nbytes)], slot[: self.slot_bytes(nbytes)]
        if self.stream is None:
            stage[: src.numel()].copy_(src)
            _all_gather(whole, stage)
            return
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(self._free[at])
            with self.meter.copying():
                stage[: src.numel()].copy_(src, non_blocking=True)
            src_consumed.record(self.stream)
            self._staged[at].record(self.stream)
        with torch.cuda.stream(self._gather):
            self._gather.wait_event(self._staged[at])
            self._gather.wait_event(slot_free)
            _all_gather(whole, stage)
            ready.record(self._gather)
            self._free[at].record(self._gather)


def scatter(
    transfer: WeightTransfer,
    sources: Sequence[tuple[torch.Tensor, int]],
    slot: torch.Tensor,
    slot_free: Any,
    ready: Any,
) -> None:
    """Copy each of `sources` (uint8, in host memory) to its offset in `slot`, over the link of a `transfer`; the events
    are those of `WeightTransfer.transfer`."""
    targets = [(slot[offset : offset + source.numel()], source) for source, offset in sources]
    if transfer.stream is None:
        for target, source in targets:
            target.copy_(source)
        return
    with torch.cuda.stream(transfer.stream):
        transfer.stream.wait_event(slot_free)
        with transfer.meter.copying():
            for target, source in targets:
                target.copy_(source, non_blocking=True)
        ready.record(transfer.stream)


def new_stream(device: torch.device) -> Any:
    """A stream of its own on the GPU, None on the CPU."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


class ComputeStream:
    """The stream on which passes compute: the one that is current when a pass begins. Does nothing on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.is_there = device.type == "cuda"
        self._stream: Any = torch.cuda.current_stream(device) if self.is_there else None

    def follow(self) -> None:
        """A pass begins: from here on the current stream is meant. It waits for what the one before has to do.

        Once a pass, not at each use: to ask for the current stream takes longer than the use.
        """
        if not self.is_there:
            return
        current = torch.cuda.current_stream(self._device)
        if current != self._stream:
            current.wait_stream(self._stream)
            self._stream = current

    def wait(self, event: Any) -> None:
        """Let all that is enqueued from here on wait for `event`."""
        if self.is_there:
            self._stream.wait_event(event)

    def is_idle(self) -> bool:
        """Whether all that was enqueued is done, so that the GPU waits for the host; False on the CPU."""
        return self.is_there and bool(self._stream.query())

    def record(self, event: Any) -> None:
        """Let `event` tell when what is enqueued so far is done."""
        if self.is_there:
            event.record(self._stream)


def new_event(device: torch.device, *, timed: bool = False, blocking: bool = False) -> Any:
    """An event on the GPU, None on the CPU. A thread that waits for a `blocking` one leaves its core to others."""
    if device.type != "cuda":
        return None
    return torch.cuda.Event(enable_timing=timed, blocking=blocking)  # type: ignore[no-untyped-call]
