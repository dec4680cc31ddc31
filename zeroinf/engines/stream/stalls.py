"""Measures how long the compute stream waits for weights, without making the host wait."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch

from zeroinf.engines.base import Stalls
from zeroinf.engines.stream.transfer import ComputeStream, new_event

# How many blocks may be unread before those that are over are read: a pass or so.
_UNREAD = 64


class StallMeter:
    """Three marks on the compute stream for each block: it is wanted, it is there, it has been used.

    Between wanted and there lies a wait for the disk, as far as the host was held up by it, and for the link; between
    there and used the block's own work; between used and the next one wanted all the rest. Parts of a block's experts
    are blocks, too, before and after which it goes on. Marks are timing events that are read when they are over.
    """

    def __init__(self, device: torch.device, compute: ComputeStream) -> None:
        self._device, self._compute = device, compute
        self._marks: deque[tuple[Any, float]] = deque()
        self._spare: list[Any] = []
        self._link_s = self._disk_s = self._compute_s = self._host_s = 0.0
        self._depth = 0
        """Blocks that are in use: one, or one and a part of its experts."""

    def wanted(self) -> None:
        if self._depth:  # what computes now stands still
            self._mark()
        self._depth += 1
        self._mark()

    def there(self, disk_s: float) -> None:
        """`disk_s`: how long the host was held up because the block had not been read."""
        if self._compute.is_there:
            self._mark(disk_s)
        else:
            self._disk_s += disk_s

    def used(self) -> None:
        self._depth -= 1
        self._mark()
        if self._depth:  # it goes on at once
            self._mark()
            self._mark()
        if len(self._marks) > 3 * _UNREAD:
            self._read()

    def total(self) -> Stalls:
        """All blocks that are over."""
        self._read()
        return Stalls(
            link_s=self._link_s, disk_s=self._disk_s, compute_s=self._compute_s, host_s=self._host_s
        )  # fmt: skip

    def _mark(self, disk_s: float = 0.0) -> None:
        if self._compute.is_there:
            event = self._spare.pop() if self._spare else new_event(self._device, timed=True)
            self._compute.record(event)
            self._marks.append((event, disk_s))

    def _read(self) -> None:
        """Count blocks up to the last one whose successor's first mark is over; that mark is kept."""
        while len(self._marks) > 3 and self._marks[3][0].query():
            (wanted, _), (there, disk_s), (used, _) = (self._marks.popleft() for _ in range(3))
            waited = wanted.elapsed_time(there) / 1e3
            self._disk_s += min(waited, disk_s)
            self._link_s += waited - min(waited, disk_s)
            self._compute_s += there.elapsed_time(used) / 1e3
            self._host_s += used.elapsed_time(self._marks[0][0]) / 1e3
            self._spare += [wanted, there, used]
