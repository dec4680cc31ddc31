"""Times the phases of one rank's generation: until the first tokens, filling, and the whole, idle time left out."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Phases:
    """Times of one rank's generation, in seconds."""

    generate_s: float
    first_token_s: float
    """From the start until the first tokens were known; 0 on a rank that had no rows."""
    prefill_s: float
    """From the drawing of each micro-batch until its first tokens were known, all of them together."""


class PhaseClock:
    """Is told when rows are drawn, when tokens come and when a rank has nothing to do."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._idle_s = self._prefill_s = 0.0
        self._filling_since: float | None = None
        self._first_token_s = 0.0

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start, idle time left out."""
        return time.perf_counter() - self._started - self._idle_s

    def drew(self) -> None:
        """Rows have been drawn, which have no token yet."""
        if self._filling_since is None:
            self._filling_since = self.elapsed_s

    def grew(self) -> None:
        """Rows have got their tokens of a forward."""
        if self._filling_since is not None:
            now = self.elapsed_s
            self._first_token_s = self._first_token_s or now
            self._prefill_s += now - self._filling_since
            self._filling_since = None

    def idled(self, seconds: float) -> None:
        """There was nothing to do for so long."""
        self._idle_s += seconds

    def phases(self) -> Phases:
        """The times until now."""
        return Phases(generate_s=self.elapsed_s, first_token_s=self._first_token_s, prefill_s=self._prefill_s)
