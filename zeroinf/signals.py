"""Signals that stop a run in order: Ctrl-C, and those that the system, a closed terminal or a batch queue sends."""

from __future__ import annotations

import signal

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

STOPPED_CODES = frozenset(128 + number for number in STOP_SIGNALS)
"""Exit codes of a run that one of them has stopped, as shells have it."""


def heeded_signals() -> tuple[signal.Signals, ...]:
    """The signals that stop this process: not a SIGHUP or SIGUSR1 that it was started to ignore, as by `nohup`."""
    ignorable = (signal.SIGHUP, signal.SIGUSR1)
    return tuple(n for n in STOP_SIGNALS if n not in ignorable or signal.getsignal(n) is not signal.SIG_IGN)
