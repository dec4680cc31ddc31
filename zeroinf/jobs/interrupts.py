"""Ctrl-C and SIGTERM: the first stops the run in order and within seconds, the second at once."""

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

GRACE_S = 5.0
"""How long a run may take to stop in order: a pass over a large model takes longer, and is dropped."""

_ONE_KEY_S = 0.5
"""Signals that come together are one: a terminal and a launcher both pass on what one key said."""

_MANY = 64
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """While active, a first signal raises InterruptedRunError, or is only noted in `requested` while `deferred` is set.

    The decode loop defers: it looks at `requested` between forwards, so that no collective is left half done. If the
    run is not over `GRACE_S` after the first signal, `last_resort` is called with its number and the process ends. A
    second signal ends it on the spot. For both a thread listens, since the main thread may be deep in a kernel or in a
    collective.
    """

    def __init__(self) -> None:
        self.requested = 0
        self.deferred = False
        self.last_resort: Callable[[int], None] = lambda number: None
        self._previous: dict[int, object] = {}
        self._previous_wakeup = -1
        self._listens, self._wakes = socket.socketpair()
        self._wakes.setblocking(False)

    def __enter__(self) -> Interrupts:
        self._previous_wakeup = signal.set_wakeup_fd(self._wakes.fileno(), warn_on_full_buffer=False)
        self._previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}
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
                second = self._next_signal()
            except TimeoutError:
                self.last_resort(first)
                os._exit(128 + first)
            if second:
                os._exit(128 + second)
        self._listens.close()

    def _next_signal(self) -> int:
        """The number of the next signal of ours; 0 when the run is over."""
        while number := int.from_bytes(self._listens.recv(1)):
            if number in _SIGNALS:
                return number
        return 0


def interrupted(number: int) -> InterruptedRunError:
    """The error that ends a run after signal `number`."""
    return InterruptedRunError(f"stopped by {signal.Signals(number).name}", signal_number=number)
