"""How a block gets from host memory into a device slot: whole over this rank's link, or in parts over all links."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist

from zeroinf.planner.memory import STAGES, round_up

# Releases of torch call it one name or the other.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Carrier(Protocol):
    """Moves pieces in the order in which `carry` is called, without making the host wait."""

    in_step: bool
    """All ranks must carry the same pieces."""
    stream: Any
    """On which what this rank pulls crosses its link; None on the CPU."""

    def span(self, nbytes: int) -> slice:
        """The bytes of a piece of `nbytes` that this rank pulls."""
        ...

    def slot_bytes(self, nbytes: int) -> int:
        """What a piece of `nbytes` takes in a slot."""
        ...

    def carry(
        self, mine: torch.Tensor, nbytes: int, slot: torch.Tensor, released: Any, arrived: Any, pulled: Any
    ) -> None:
        """Bring a piece of `nbytes`, of which `mine` (uint8, in host memory) is this rank's span, into `slot`.

        Nothing is written before the event `released`. Records `pulled` when `mine` has been read, `arrived` when the
        piece is whole. On the CPU there are no events, and the piece is there on return.
        """
        ...


class Replicated:
    """Each rank pulls every piece over its own link. Ranks need nothing of each other."""

    in_step = False

    def __init__(self, device: torch.device) -> None:
        self.stream = new_stream(device)

    def span(self, nbytes: int) -> slice:
        return slice(0, nbytes)

    def slot_bytes(self, nbytes: int) -> int:
        return nbytes

    def carry(
        self, mine: torch.Tensor, nbytes: int, slot: torch.Tensor, released: Any, arrived: Any, pulled: Any
    ) -> None:
        if self.stream is None:
            slot[:nbytes].copy_(mine)
            return
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(released)
            slot[:nbytes].copy_(mine, non_blocking=True)
            pulled.record(self.stream)
            arrived.record(self.stream)


class Partitioned:
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

    def carry(
        self, mine: torch.Tensor, nbytes: int, slot: torch.Tensor, released: Any, arrived: Any, pulled: Any
    ) -> None:
        at = self._turn % STAGES
        self._turn += 1
        stage, whole = self._stages[at][: self._part(nbytes)], slot[: self.slot_bytes(nbytes)]
        if self.stream is None:
            stage[: mine.numel()].copy_(mine)
            _all_gather(whole, stage)
            return
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(self._free[at])
            stage[: mine.numel()].copy_(mine, non_blocking=True)
            pulled.record(self.stream)
            self._staged[at].record(self.stream)
        with torch.cuda.stream(self._gather):
            self._gather.wait_event(self._staged[at])
            self._gather.wait_event(released)
            _all_gather(whole, stage)
            arrived.record(self._gather)
            self._free[at].record(self._gather)


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
        """What is enqueued from here on waits for `event`."""
        if self.is_there:
            self._stream.wait_event(event)

    def record(self, event: Any) -> None:
        """Let `event` tell when what is enqueued so far is done."""
        if self.is_there:
            event.record(self._stream)


def new_event(device: torch.device, *, timed: bool = False, blocking: bool = False) -> Any:
    """An event on the GPU, None on the CPU. A thread that waits for a `blocking` one leaves its core to others."""
    if device.type != "cuda":
        return None
    return torch.cuda.Event(enable_timing=timed, blocking=blocking)  # type: ignore[no-untyped-call]
