"""Handles signals that stop a run: the first one stops it in order within seconds, the second one at once."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType

from zeroinf.errors import InterruptedRunError
from zeroinf.signals import STOP_SIGNALS, heeded_signals

GRACE_S = 5.0
"""How long a run may take to stop in order: a pass over a large model takes longer, and is dropped."""

_ONE_KEY_S = 0.5
"""Signals that come together are one: a terminal and a launcher both pass on what one key said."""

_LAST_WORD_S = 1.0
"""How long a process that ends at once may take to say what is saved: its terminal may be stuck, too."""

_MANY = 64


class Interrupts:
    """While active, a first signal raises InterruptedRunError, or is only noted in `requested` while `deferred` is set.

    The decode loop defers: it looks at `requested` between forwards, so that no collective is left half done. If the
    run is not over `GRACE_S` after the first signal, `last_resort` is called with its number and the process ends. A
    second signal, or a last resort that takes as long again, ends it on the spot once `at_once` has said what is saved.
    For all that a thread listens, since the main thread may be deep in a kernel, in a collective or in a write to a
    disk that hangs; the thread itself waits for nothing else.
    """

    def __init__(self) -> None:
        self.requested = 0
        self.deferred = False
        self.last_resort: Callable[[int], None] = lambda number: None
        self.at_once: Callable[[int], None] = lambda number: None
        self._previous: dict[int, object] = {}
        self._previous_wakeup = -1
        self._listens, self._wakes = socket.socketpair()
        self._wakes.setblocking(False)

    def __enter__(self) -> Interrupts:
        self._previous_wakeup = signal.set_wakeup_fd(self._wakes.fileno(), warn_on_full_buffer=False)
        self._previous = {number: signal.signal(number, self._handle) for number in heeded_signals()}
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        signal.set_wakeup_fd(self._previous_wakeup)
        self._wakes.close()  # the listener reads the end, and ends

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            return
        self.requested = number
        if not self.deferred:
            raise interrupted(number)

    def _listen(self) -> None:
        first = self._next_signal()
        if first:
            time.sleep(_ONE_KEY_S)
            with suppress(BlockingIOError):
                self._listens.recv(_MANY, socket.MSG_DONTWAIT)
            self._listens.settimeout(GRACE_S)
            try:
                last = self._next_signal()
            except TimeoutError:
                last = self._resort(first)
            if last:
                _apart(lambda: self.at_once(last)).join(_LAST_WORD_S)
                os._exit(128 + last)
        self._listens.close()

    def _resort(self, first: int) -> int:
        """Let the last resort end the process; the signal to end it at once with, if it does not."""

        def end() -> None:
            self.last_resort(first)
            os._exit(128 + first)

        _apart(end)
        try:
            return self._next_signal()
        except TimeoutError:
            return first

    def _next_signal(self) -> int:
        """The number of the next signal of ours; 0 when the run is over."""
        while number := int.from_bytes(self._listens.recv(1)):
            if number in STOP_SIGNALS:
                return number
        return 0


def _apart(body: Callable[[], None]) -> threading.Thread:
    """A thread that runs `body`, and does not keep the process alive."""
    thread = threading.Thread(target=body, name="stopping", daemon=True)
    thread.start()
    return thread


def interrupted(number: int) -> InterruptedRunError:
    """The error that ends a run after signal `number`."""
    return InterruptedRunError(f"stopped by {signal.Signals(number).name}", signal_number=number)
