"""How a block gets from host memory into a device slot: whole over this rank's link, or in parts over all links."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist

_STAGES = 4


class Carrier(Protocol):
    """Moves pieces in the order in which `carry` is called, without making the host wait."""

    parts: int
    """Every piece must be a multiple of this many aligned parts."""

    def carry(self, piece: torch.Tensor, slot: torch.Tensor, released: Any, arrived: Any) -> None:
        """Bring `piece` (uint8, in host memory) into `slot` (as long) after the event `released`; record `arrived`.

        On the CPU there are no events, and the piece is there on return.
        """
        ...


class Replicated:
    """Each rank pulls every piece over its own link. Ranks need nothing of each other."""

    parts = 1

    def __init__(self, device: torch.device) -> None:
        self._stream = _new_stream(device)

    def carry(self, piece: torch.Tensor, slot: torch.Tensor, released: Any, arrived: Any) -> None:
        if self._stream is None:
            slot.copy_(piece)
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(released)
            slot.copy_(piece, non_blocking=True)
            arrived.record()


class Partitioned:
    """Each rank pulls 1/n over its own link, and an all-gather over the links between GPUs makes the piece whole.

    n ranks use n links for one walk over the weights. The part of the next piece crosses the link while the current
    one is gathered: each step has a stream of its own, with a ring of small stages between them. Every rank must carry
    the same pieces.
    """

    def __init__(self, device: torch.device, rank: int, ranks: int, largest_piece: int) -> None:
        self.parts = ranks
        self._rank = rank
        self._pull, self._gather = _new_stream(device), _new_stream(device)
        part = largest_piece // ranks
        self._stages = [torch.empty(part, dtype=torch.uint8, device=device) for _ in range(_STAGES)]
        self._staged = [new_event(device) for _ in range(_STAGES)]
        self._free = [new_event(device) for _ in range(_STAGES)]
        self._turn = 0

    def carry(self, piece: torch.Tensor, slot: torch.Tensor, released: Any, arrived: Any) -> None:
        part = piece.numel() // self.parts
        mine = piece[self._rank * part : (self._rank + 1) * part]
        at = self._turn % _STAGES
        self._turn += 1
        stage = self._stages[at][:part]
        if self._pull is None:
            stage.copy_(mine)
            dist.all_gather_into_tensor(slot, stage)
            return
        with torch.cuda.stream(self._pull):
            self._pull.wait_event(self._free[at])
            stage.copy_(mine, non_blocking=True)
            self._staged[at].record()
        with torch.cuda.stream(self._gather):
            self._gather.wait_event(self._staged[at])
            self._gather.wait_event(released)
            dist.all_gather_into_tensor(slot, stage)
            arrived.record()
            self._free[at].record()


def _new_stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


def new_event(device: torch.device) -> Any:
    """An event on the GPU, None on the CPU."""
    return torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]
