"""Device slots in a ring: blocks cross the link ahead of their turn, without end and without the host ever waiting."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from zeroinf.engines.stream.carrier import Carrier, new_event


class Ring:
    """`slots` pieces of device memory through which `pieces` (uint8, in host memory) pass in order, again and again.

    `acquire` makes the compute stream wait until the next piece has arrived; `release` says that everything enqueued so
    far is the last use of it, and lets the carrier start on the piece that will follow in its slot. The order of pieces
    goes on over the end of a pass: while the last blocks compute, the first ones of the next pass arrive.
    """

    def __init__(self, pieces: Sequence[torch.Tensor], slots: int, device: torch.device, carrier: Carrier) -> None:
        self._pieces = pieces
        self._carrier = carrier
        self._on_gpu = device.type == "cuda"
        largest = max(piece.numel() for piece in pieces)
        count = min(slots, len(pieces))
        self.slots = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(count)]
        self._arrived = [new_event(device) for _ in range(count)]
        self._released = [new_event(device) for _ in range(count)]
        self._turn = 0
        for turn in range(count):
            self._fetch(turn)

    def acquire(self, piece: int) -> int:
        """The number of the slot that holds `piece`, which must be the next in order."""
        if piece != self._turn % len(self._pieces):
            raise RuntimeError(f"block {piece} ran out of order: {self._turn % len(self._pieces)} is in the slot")
        slot = self._turn % len(self.slots)
        if self._on_gpu:
            torch.cuda.current_stream().wait_event(self._arrived[slot])
        return slot

    def release(self) -> None:
        """The current piece has been used: its slot may be overwritten once the work enqueued so far is done."""
        if self._on_gpu:
            self._released[self._turn % len(self.slots)].record()
        self._fetch(self._turn + len(self.slots))
        self._turn += 1

    def _fetch(self, turn: int) -> None:
        slot, piece = turn % len(self.slots), self._pieces[turn % len(self._pieces)]
        target = self.slots[slot][: piece.numel()]
        self._carrier.carry(piece, target, self._released[slot], self._arrived[slot])
