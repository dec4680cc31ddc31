"""Reads pieces from a store ahead of their use, pass after pass, into a ring of page-locked buffers.

Input: an open store and the byte ranges that this rank needs. Output: host buffers in the order of use. It knows no GPU
beyond the event that says that a buffer has been copied.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from zeroinf.engines.stream.data_files import THREADS
from zeroinf.engines.stream.host_memory import HostMemory, view_of
from zeroinf.engines.stream.store import FileRange
from zeroinf.engines.stream.stored_weights import StoreInUse
from zeroinf.engines.stream.transfer import new_event
from zeroinf.planner.memory import PIECE_ALIGNMENT, READ_BUFFERS, round_up


class ReadAhead:
    """Threads that read this rank's `spans` of `pieces` in order, repeatedly, as long as buffers are free.

    Data read in the first pass is compared with its digests. The caller takes the pieces in the same order: `take`,
    then enqueue a copy that records the returned event, then `give_back`. A buffer is reused once its copy is done;
    only the threads wait for that. An error in a thread is raised by the next `is_ready` or `take`.
    """

    def __init__(
        self, used: StoreInUse, pieces: Sequence[int], spans: Sequence[slice], device: torch.device, *, pin: bool
    ) -> None:
        self._used, self._pieces, self._spans = used, pieces, spans
        size = round_up(max(span.stop - span.start for span in spans), PIECE_ALIGNMENT) or PIECE_ALIGNMENT
        self._memory = HostMemory(READ_BUFFERS * size, pin=pin)
        self._buffers = [self._memory.bytes[at * size : (at + 1) * size] for at in range(READ_BUFFERS)]
        self._copied = [new_event(device, blocking=True) for _ in range(READ_BUFFERS)]
        self._taken = self._given_back = self._begun = 0
        self._queue: deque[tuple[int, FileRange]] = deque()
        self._unread: dict[int, int] = {}
        self._error: Exception | None = None
        self._closed = False
        self._changed = threading.Condition()
        self.waited_s = 0.0
        """How long `take` waited for the disk."""
        self._threads = [threading.Thread(target=self._work, name="read-ahead", daemon=True) for _ in range(THREADS)]
        for thread in self._threads:
            thread.start()

    @property
    def pinned_bytes(self) -> int:
        return self._memory.pinned_bytes

    def is_ready(self) -> bool:
        """Whether `take` would return at once. Raises what went wrong in a thread."""
        with self._changed:
            return self._is_ready()

    def take(self) -> tuple[torch.Tensor, Any]:
        """The next piece's span (uint8, in host memory), and the event to record when it has been copied."""
        with self._changed:
            if not self._is_ready():
                started = time.perf_counter()
                self._changed.wait_for(self._is_ready)
                self.waited_s += time.perf_counter() - started
            turn = self._taken
            self._taken += 1
            return self._buffer(turn), self._copied[turn % READ_BUFFERS]

    def give_back(self) -> None:
        """The copy of the piece that was taken is enqueued and its event recorded."""
        with self._changed:
            self._given_back += 1
            self._changed.notify_all()

    def close(self) -> None:
        """End the threads and free the buffers."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._memory.close()

    def _is_ready(self) -> bool:
        if self._error is not None:
            raise self._error
        return self._taken < self._begun and self._unread[self._taken] == 0

    def _buffer(self, turn: int) -> torch.Tensor:
        span = self._spans[turn % len(self._spans)]
        return self._buffers[turn % READ_BUFFERS][: span.stop - span.start]

    def _work(self) -> None:
        try:
            while (job := self._next()) is not None:
                self._read(*job)
        except Exception as error:
            with self._changed:
                self._error = self._error or error
                self._closed = True
                self._changed.notify_all()

    def _next(self) -> tuple[int, FileRange] | None:
        with self._changed:
            while not self._queue:
                self._changed.wait_for(
                    lambda: self._closed or self._begun < self._given_back + READ_BUFFERS or self._queue
                )
                if self._closed:
                    return None
                if not self._queue:
                    self._begin()
            return None if self._closed else self._queue.popleft()

    def _begin(self) -> None:
        """Put the requests of one more turn into the queue."""
        turn, at = self._begun, self._begun % len(self._pieces)
        span = self._spans[at]
        file_ranges = list(self._used.store.contents.file_ranges(self._pieces[at], span.start, span.stop))
        self._queue.extend((turn, request) for request in file_ranges)
        self._unread[turn] = len(file_ranges)
        self._unread.pop(turn - READ_BUFFERS, None)
        self._begun += 1
        self._changed.notify_all()

    def _read(self, turn: int, request: FileRange) -> None:
        copied = self._copied[turn % READ_BUFFERS]
        if copied is not None:
            copied.synchronize()
        at = turn % len(self._pieces)
        start = request.start - self._spans[at].start
        target = view_of(self._buffer(turn))[start : start + request.nbytes]
        self._used.files.read(request, target)
        if turn < len(self._pieces):
            self._used.store.check(self._pieces[at], request, target)
        with self._changed:
            self._unread[turn] -= 1
            if not self._unread[turn]:
                self._changed.notify_all()
