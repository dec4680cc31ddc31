"""A ring of device slots: copies blocks to the GPU ahead of their use, across pass boundaries, without making the host
wait.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from zeroinf.engines.stream.read_ahead import ReadAhead
from zeroinf.engines.stream.stalls import StallMeter
from zeroinf.engines.stream.transfer import ComputeStream, WeightTransfer, new_event, scatter


@dataclass(frozen=True, slots=True)
class Piece:
    """The data of a block on its way to a slot: `memory` (uint8) holds it, or it is read from the store (None)."""

    nbytes: int
    memory: torch.Tensor | None


Source = tuple[torch.Tensor, int]
"""Bytes in host memory (uint8), and where in a slot they go."""


class Ring:
    """`slots` pieces of device memory through which `pieces` pass in order, again and again.

    `acquire` makes the compute stream wait until the next piece has arrived; `release` says that everything enqueued so
    far is the last use of the one that was acquired first, and lets the carrier start on the piece that will follow in
    its slot. As many may be held as there are slots, so that a few are on their way meanwhile. The order of pieces
    goes on over the end of a pass: while the last blocks compute, the first ones of the next pass arrive. The host
    waits only where the piece whose turn it is has not been read from the store yet.

    A ring that `yields` serves passes that need all pieces, which `begin` announces, and others, which `bring`
    something else into its slots. Beyond the end of passes that have begun it carries only what can be carried again.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        slots: int,
        device: torch.device,
        transfer: WeightTransfer,
        ahead: ReadAhead | None,
        compute: ComputeStream | None = None,
        stalls: StallMeter | None = None,
        *,
        yields: bool = False,
    ) -> None:
        """Rings that take turns share `compute` (None: the current stream) and `stalls`, a meter of it."""
        self._yields, self._begun, self._brought, self._is_lent = yields, 0, 0, False
        self._pieces, self._transfer, self._ahead = pieces, transfer, ahead
        self._compute = compute or ComputeStream(device)
        largest = max(transfer.slot_bytes(piece.nbytes) for piece in pieces)
        count = min(slots, len(pieces))
        self.slots = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(count)]
        self.stalls = stalls or StallMeter(device, self._compute)
        self._arrived = [new_event(device) for _ in range(count)]
        self._released = [new_event(device) for _ in range(count)]
        self._pulled = new_event(device)
        self._turn = self._carried = self._held = 0
        for event in self._released:  # the slots' memory may still be in use by what loading has enqueued
            self._compute.record(event)
        self._transfer_ahead()

    def acquire(self, piece: int) -> int:
        """The number of the slot that holds `piece`, which must be the next in order."""
        turn = self._turn + self._held
        if piece != turn % len(self._pieces):
            raise RuntimeError(f"block {piece} ran out of order: {turn % len(self._pieces)} is in the slot")
        slot = turn % len(self.slots)
        self.stalls.wanted()
        waited_s = self._ahead.waited_s if self._ahead is not None else 0.0
        self._transfer_ahead(needed=turn)
        self._compute.wait(self._arrived[slot])
        self._held += 1
        self.stalls.there(self._ahead.waited_s - waited_s if self._ahead is not None else 0.0)
        return slot

    def release(self) -> None:
        """The piece that was acquired first has been used: its slot may be overwritten once the work enqueued so far is
        done."""
        self._compute.record(self._released[self._turn % len(self.slots)])
        self.stalls.used()
        self._held -= 1
        self._turn += 1
        self._transfer_ahead()

    def begin(self) -> None:
        """A pass that needs all pieces begins."""
        self._begun += 1
        self._transfer_ahead()

    def bring(self, find: Callable[[], tuple[Sequence[Source], float]]) -> int:
        """Let a slot hold what `find` finds, between passes that need pieces; the slot's number. It says, too, for how
        many seconds it waited for a disk. `give_back` ends the use of the slot."""
        self._carried = self._turn  # what came ahead of the next pass is carried once more
        slot = self._brought % len(self.slots)
        self._brought += 1
        self.stalls.wanted()
        self._is_lent = True
        sources, waited_s = find()
        scatter(self._transfer, sources, self.slots[slot], self._released[slot], self._arrived[slot])
        self._compute.wait(self._arrived[slot])
        self.stalls.there(waited_s)
        return slot

    def give_back(self) -> None:
        """What was brought last has been used once the work enqueued so far is done."""
        self._compute.record(self._released[(self._brought - 1) % len(self.slots)])
        self.stalls.used()
        self._is_lent = False

    def settle(self) -> None:
        """Return when all copies are over."""
        if self._transfer.stream is not None:
            self._transfer.stream.synchronize()

    def finish(self, passes: int) -> None:
        """Let the pieces that are left of so many passes go by unused: the last one broke, before or after it began."""
        if self._is_lent:
            self.give_back()
        passes = self._begun if self._yields else passes
        while self._held:
            self.release()
        while self._turn < passes * len(self._pieces):
            self.acquire(self._turn % len(self._pieces))
            self.release()

    def _transfer_ahead(self, *, needed: int = -1) -> None:
        """Carry what has a free slot and can be had without waiting, and the piece whose turn is `needed`.

        Where ranks must carry the same pieces, what they carry does not depend on what their disks have done so far.
        """
        while self._carried < self._turn + len(self.slots):
            turn = self._carried
            piece = self._pieces[turn % len(self._pieces)]
            if piece.memory is None and turn != needed and not self._may_take(turn):
                return
            self._transfer_one(turn % len(self.slots), piece)
            self._carried += 1

    def _may_take(self, turn: int) -> bool:
        assert self._ahead is not None
        if self._yields and turn >= self._begun * len(self._pieces):
            return False
        return not self._transfer.in_step and self._ahead.is_ready()

    def _transfer_one(self, slot: int, piece: Piece) -> None:
        if piece.memory is not None:
            mine, pulled = piece.memory[self._transfer.span(piece.nbytes)], self._pulled
        else:
            assert self._ahead is not None
            mine, pulled = self._ahead.take()
        self._transfer.transfer(
            mine, piece.nbytes, self.slots[slot], self._released[slot], self._arrived[slot], pulled
        )  # fmt: skip
        if piece.memory is None:
            assert self._ahead is not None
            self._ahead.give_back()
