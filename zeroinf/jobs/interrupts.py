"""Ctrl-C and SIGTERM: the first stops the run in order, the second at once."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType

from zeroinf.errors import InterruptedRunError

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """While active, a first signal raises InterruptedRunError, or is only noted in `requested` while `deferred` is set.

    The decode loop defers: it looks at `requested` between forwards, so that no collective is left half done.
    A second signal ends the process on the spot.
    """

    def __init__(self) -> None:
        self.requested = 0
        self.deferred = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Interrupts:
        self._previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            os._exit(128 + number)
        self.requested = number
        if not self.deferred:
            raise interrupted(number)


def interrupted(number: int) -> InterruptedRunError:
    """The error that ends a run after signal `number`."""
    return InterruptedRunError(f"stopped by {signal.Signals(number).name}", signal_number=number)
