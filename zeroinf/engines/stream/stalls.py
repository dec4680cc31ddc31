"""Measures what the compute stream spends its time on, without making the host wait.

Input: calls at the boundaries of layers, from the ring and the engine. Output: seconds by cause. Marks are timing
events on the compute stream, read when they are over; the time between two marks has one cause.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, Literal

import torch

from zeroinf.engines.base import Stalls
from zeroinf.engines.stream.transfer import ComputeStream, new_event

# How many marks may be unread before those that are over are read: a pass or so.
_UNREAD = 192


@dataclass(slots=True)
class _Mark:
    """A point on the compute stream, and what the time from the mark before it to this one was spent on."""

    event: Any
    spent: Literal["compute", "host", "weights", "between"]
    disk_s: float = 0.0
    """Of this time, how long the host was held up by the disk."""


class StallMeter:
    """Tells computing from three kinds of waiting: for weights, for the host, and between passes.

    The GPU waits for the host where it has no work queued: the stream is empty when the host begins with the next
    layer. Then the gap up to there is the host's, and so is the layer before, whose kernels ran as fast as the host
    launched them, or as the host waited for their results. Where work is still queued, the layer took as long as it
    computes. Between the last layer of a pass and the first one of the next lie the head, sampling and the scheduler.
    Parts of a layer's experts are metered like layers, inside of theirs.
    """

    def __init__(self, device: torch.device, compute: ComputeStream) -> None:
        self._device, self._compute = device, compute
        self._marks: deque[_Mark] = deque()
        self._spare: list[Any] = []
        self._seconds = dict.fromkeys(("compute", "host", "weights", "between"), 0.0)
        self._disk_s = 0.0
        self._depth = 0
        """Layers that are in use: one, or one and a part of its experts."""
        self._begins = True
        """The next layer is the first of a pass."""

    def wanted(self) -> None:
        """The host begins with a layer, or a part of its experts."""
        if self._begins:
            self._mark("between")
        else:
            is_idle = self._note_idle()
            if is_idle or self._depth:
                self._mark("host" if is_idle else "compute")
        self._begins = False
        self._depth += 1

    def there(self, disk_s: float) -> None:
        """Its weights have arrived in the stream's order. `disk_s`: how long the host was held up because they had not
        been read. Not called for layers that stay on the GPU."""
        if self._compute.is_there:
            self._mark("weights", disk_s)
        else:
            self._disk_s += disk_s

    def held_up(self, disk_s: float) -> None:
        """The host has waited for a disk, with nothing more for the GPU to do."""
        if self._compute.is_there:
            self._mark("between" if self._begins else "host", disk_s)
        else:
            self._disk_s += disk_s

    def used(self) -> None:
        """All of its work is enqueued."""
        self._depth -= 1
        self._mark("compute")
        if len(self._marks) > _UNREAD:
            self._read()

    def end_pass(self) -> None:
        """A pass is over, or has broken."""
        if not self._begins:
            self._note_idle()
        self._depth, self._begins = 0, True

    def total(self) -> Stalls:
        """All that is over."""
        self._read()
        return Stalls(
            link_s=self._seconds["weights"],
            disk_s=self._disk_s,
            compute_s=self._seconds["compute"],
            host_s=self._seconds["host"],
            between_s=self._seconds["between"],
        )

    def _note_idle(self) -> bool:
        """Whether the GPU has nothing left to do; then what it did last, it did at the host's pace."""
        is_idle = self._compute.is_idle()
        if is_idle and self._marks and self._marks[-1].spent == "compute":
            self._marks[-1].spent = "host"
        return is_idle

    def _mark(self, spent: Literal["compute", "host", "weights", "between"], disk_s: float = 0.0) -> None:
        if self._compute.is_there:
            event = self._spare.pop() if self._spare else new_event(self._device, timed=True)
            self._compute.record(event)
            self._marks.append(_Mark(event, spent, disk_s))

    def _read(self) -> None:
        """Count up to the last mark that is over, but for the newest one, of which more may become known."""
        while len(self._marks) > 2 and self._marks[1].event.query():
            before, mark = self._marks.popleft(), self._marks[0]
            seconds = before.event.elapsed_time(mark.event) / 1e3
            held_up = min(seconds, mark.disk_s)
            self._disk_s += held_up
            self._seconds[mark.spent] += seconds - held_up
            self._spare.append(before.event)
