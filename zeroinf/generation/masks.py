"""Computes, in threads of its own, which tokens may follow in answers that have a format, while the next pass runs.

As soon as the tokens of a pass are on the host, one thread follows the answers with them, so that the loop learns which
of them are complete; another then fills the masks for the choice after the next pass. The loop waits for a mask where
it chooses, which it seldom has to: a pass takes longer. Masks lie in page-locked memory, a bit for each token and a row
for each seat, and are read from there by a kernel.

A seat's masks are filled in the order of its tokens, and those of a later row in the same seat behind them: one thread
fills all of them. It starts with a mask only when the token before is there, and the device has read the one before by
then.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from zeroinf.compat.host_arrays import mapped
from zeroinf.generation.row import Row
from zeroinf.generation.seats import Seat
from zeroinf.generation.upload import to_device
from zeroinf.structured.matcher import WORD_BITS, Vocabulary

_AT_ONCE = 1 << 23
"""Scores whose mask is unpacked at a time: a byte or two each."""


class Masks:
    """Masks for the seats of one batch state. Only the loop's thread calls it."""

    def __init__(self, seats: int, device: torch.device) -> None:
        self._seats, self._device = seats, device
        self._packed: torch.Tensor | None = None
        """(seats, words), int64, in host memory."""
        self._held: torch.Tensor | None = None
        """The same memory, as the device reads it."""
        self._bits: torch.Tensor | None = None
        """(8,), uint8, on the device: each bit of a byte."""
        self._following = ThreadPoolExecutor(1, thread_name_prefix="zeroinf-answers")
        self._filling = ThreadPoolExecutor(1, thread_name_prefix="zeroinf-masks")
        self._filled: dict[Row, Future[None]] = {}
        self.waited_s = 0.0
        """Seconds that the loop has waited for masks: those that a pass did not hide."""

    def enter(self, seats: Sequence[Seat]) -> None:
        """`seats` are taken by rows, of which some may have generated tokens already."""
        own = [seat for seat in seats if seat.row.answer is not None]
        if not own:
            return
        assert own[0].row.answer is not None
        packed = self._memory(own[0].row.answer.vocabulary)

        def enter() -> None:
            for seat in own:
                assert seat.row.answer is not None
                seat.row.answer.follow(seat.row.generated)
            self._fill(own, packed)

        self._submit(own, enter)

    def follow(self, seats: Sequence[Seat], tokens: Callable[[], Sequence[int]]) -> Future[None] | None:
        """`tokens`, called from another thread, waits for those chosen for `seats`. The future is done when the answers
        of the rows have gone on with them; None where no row has a format."""
        own = [(number, seat) for number, seat in enumerate(seats) if _goes_on(seat.row)]
        if not own:
            return None

        packed, answer = self._packed, own[0][1].row.answer
        assert packed is not None and answer is not None
        vocabulary = answer.vocabulary

        def follow() -> None:
            found = tokens()
            answers = [(seat.row.answer, found[number]) for number, seat in own]
            vocabulary.take([(answer, token) for answer, token in answers if answer is not None and token >= 0])

        following = self._following.submit(follow)

        def fill() -> None:
            following.result()
            self._fill([seat for _, seat in own], packed)

        self._submit([seat for _, seat in own], fill)
        return following

    def _submit(self, seats: Sequence[Seat], fill: Callable[[], None]) -> None:
        filled = self._filling.submit(fill)
        for seat in seats:
            self._filled[seat.row] = filled

    def _fill(self, seats: Sequence[Seat], packed: torch.Tensor) -> None:
        """Write the masks of rows that go on; one that cannot gets none of the tokens."""
        answers = [(seat.row.answer, seat.number) for seat in seats if seat.row.answer is not None]
        going_on = [(answer, row) for answer, row in answers if not (answer.is_complete or answer.problem)]
        answers[0][0].vocabulary.fill(going_on, packed.data_ptr(), len(packed))
        for answer, _ in going_on:
            answer.check()
        for answer, row in answers:
            if answer.problem:
                packed[row] = 0

    def _memory(self, vocabulary: Vocabulary) -> torch.Tensor:
        """Room for the masks of all seats. Page-locked memory is the business of the thread that has the GPU."""
        if self._packed is None:
            pinned = self._device.type == "cuda"
            self._packed = torch.zeros(self._seats, vocabulary.words, dtype=torch.int64, pin_memory=pinned)
            self._held = mapped(self._packed, self._device) if pinned else self._packed
        return self._packed

    def leave(self, seats: Sequence[Seat]) -> None:
        """The rows of `seats` have ended, or wait again."""
        for seat in seats:
            self._filled.pop(seat.row, None)

    def forbid(self, scores: torch.Tensor, seats: Sequence[Seat], numbers: torch.Tensor) -> torch.Tensor | None:
        """Set the scores (rows, vocabulary) of tokens that may not come next to minus infinity, in place. `numbers`:
        those of `seats`, (rows,), int64, on the device.

        Returns the rows for which no token is left, (rows,), bool; None where no row has a format.
        """
        members = [place for place, seat in enumerate(seats) if seat.row.sampling.answer_format is not None]
        if not members:
            return None
        self._wait_for([seats[place].row for place in members])
        index = None if len(members) == len(seats) else to_device(members, scores.device)
        own = numbers if index is None else numbers.index_select(0, index)
        packed, bits = self._on_device(own, -(-scores.shape[1] // WORD_BITS))
        step = max(1, _AT_ONCE // scores.shape[1])
        for start in range(0, len(members), step):
            part = slice(start, start + step)
            if index is None:
                _forbid(scores[part], packed[part], bits)
            else:
                scores.index_copy_(0, index[part], _forbid(scores.index_select(0, index[part]), packed[part], bits))
        return scores.amax(dim=-1).isneginf()

    def _wait_for(self, rows: Sequence[Row]) -> None:
        """Wait until the masks of `rows` are filled."""
        started = time.perf_counter()
        for filled in {self._filled[row] for row in rows if row in self._filled}:
            filled.result()
        self.waited_s += time.perf_counter() - started

    def _on_device(self, numbers: torch.Tensor, words: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The masks of the seats of these `numbers`, (seats, words), int64, and the bits of a byte."""
        if self._bits is None:
            self._bits = to_device([1 << bit for bit in range(8)], self._device).to(torch.uint8)
        held = self._held
        if held is None:  # a simulated choice
            held = torch.empty(self._seats, words, dtype=torch.int64, device=self._device)
        return held.index_select(0, numbers), self._bits


def _goes_on(row: Row) -> bool:
    return row.answer is not None and row.finish_reason is None


def _forbid(scores: torch.Tensor, packed: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """`scores` (rows, vocabulary), those whose bits are not set in `packed` (rows, words) at minus infinity."""
    held = packed.view(torch.uint8)[:, :, None].bitwise_and(bits).view(len(packed), -1)
    scores[:, : held.shape[1]].masked_fill_(held[:, : scores.shape[1]].eq(0), -torch.inf)
    scores[:, held.shape[1] :] = -torch.inf  # no tokens of the model's
    return scores
