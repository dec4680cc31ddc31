"""Device slots in a ring: blocks cross the link ahead of their turn, without end and without the host ever waiting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class Ring:
    """`slots` pieces of device memory through which `pieces` (uint8, in host memory) pass in order, again and again.

    Copies run on a stream of their own. `acquire` makes the compute stream wait until the next piece has arrived;
    `release` says that everything enqueued so far is the last use of it, and starts the copy that follows. The order of
    pieces goes on over the end of a pass: while the last blocks compute, the first ones of the next pass arrive.
    On the CPU a copy is a copy, and nothing waits.
    """

    def __init__(self, pieces: Sequence[torch.Tensor], slots: int, device: torch.device) -> None:
        self._pieces = pieces
        largest = max(piece.numel() for piece in pieces)
        count = min(slots, len(pieces))
        self._slots = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(count)]
        on_gpu = device.type == "cuda"
        self._stream: Any = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]
        self._arrived = [self._event() for _ in range(count)]
        self._released = [self._event() for _ in range(count)]
        self._turn = 0
        for turn in range(count):
            self._fetch(turn)

    @property
    def nbytes(self) -> int:
        """Device memory of all slots."""
        return sum(slot.numel() for slot in self._slots)

    @property
    def slots(self) -> Sequence[torch.Tensor]:
        return self._slots

    def acquire(self, piece: int) -> int:
        """The number of the slot that holds `piece`, which must be the next in order."""
        if piece != self._turn % len(self._pieces):
            raise RuntimeError(f"block {piece} ran out of order: {self._turn % len(self._pieces)} is in the slot")
        slot = self._turn % len(self._slots)
        if self._stream is not None:
            torch.cuda.current_stream().wait_event(self._arrived[slot])
        return slot

    def release(self) -> None:
        """The current piece has been used: its slot may be overwritten once the work enqueued so far is done."""
        slot = self._turn % len(self._slots)
        if self._stream is not None:
            self._released[slot].record()
        self._fetch(self._turn + len(self._slots))
        self._turn += 1

    def _fetch(self, turn: int) -> None:
        slot, piece = turn % len(self._slots), self._pieces[turn % len(self._pieces)]
        target = self._slots[slot][: piece.numel()]
        if self._stream is None:
            target.copy_(piece)
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._released[slot])
            target.copy_(piece, non_blocking=True)
            self._arrived[slot].record()

    def _event(self) -> Any:
        return None if self._stream is None else torch.cuda.Event()  # type: ignore[no-untyped-call]
