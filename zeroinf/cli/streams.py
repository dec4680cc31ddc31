"""Makes standard streams that cannot end a job: failed writes to stderr are dropped, failed writes to stdout are
reported.

Stderr shows progress and may be a closed terminal, a pipe without a reader, or a file on a full disk. Stdout carries
results, so a failed write there becomes an error that says what is lost. Streams that were closed are opened again.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any


class _Steady:
    """The text or byte stream `stream`, of which subclasses say what becomes of a write that failed."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def failed(self, error: OSError) -> None:
        """Called for each write that failed."""

    def write(self, data: Any) -> int:
        """Write `data`, text or bytes as the stream is."""
        try:
            self._stream.write(data)
        except OSError as error:
            self.failed(error)
        return len(data)

    def writelines(self, lines: Any) -> None:
        """Write each line."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Hand on what is buffered."""
        try:
            self._stream.flush()
        except OSError as error:
            self.failed(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Display(_Steady):
    """A stream of which failed writes are dropped.

    While `above` is set, it takes the text that is written: what somebody else redraws on the same terminal would be
    glued to it otherwise, also where a logger has kept this stream. Whoever redraws writes to `below`.
    """

    above: Callable[[str], object] | None = None

    def write(self, data: Any) -> int:
        """Write `data`, text or bytes as the stream is."""
        if self.above is None or not isinstance(data, str):
            return super().write(data)
        self.above(data)
        return len(data)

    def below(self) -> Display:
        """A stream to the same place."""
        return Display(self._stream)

    @property
    def buffer(self) -> Display:
        """The bytes below the text."""
        return Display(self._stream.buffer)


class ResultStream(_Steady):
    """A stream that remembers why a write failed."""

    trouble: OSError | None = None

    def failed(self, error: OSError) -> None:
        """Raise it again."""
        self.trouble = error
        raise error


def steady_streams() -> None:
    """Open standard streams that were closed, and make standard error a Display.

    A descriptor that stays closed would be that of the next file which is opened, and what is printed would go into it.
    Reading from standard input that was closed finds nothing; writing to standard output that was closed fails.
    """
    for descriptor, mode in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, mode)  # the lowest that is free: this one
            os.set_inheritable(opened, True)  # ranks have them, too
    sys.stdin = sys.stdin or open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = sys.stdout or io.TextIOWrapper(open(1, "wb", closefd=False), encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if not isinstance(sys.stderr, Display):
        sys.stderr = Display(sys.stderr)
    if not isinstance(sys.stdout, ResultStream):
        sys.stdout = ResultStream(sys.stdout)


def trouble_with_stdout() -> OSError | None:
    """Why what was printed cannot be written, None where it was. What is left of it is dropped."""
    assert isinstance(sys.stdout, ResultStream)
    with suppress(OSError):
        sys.stdout.flush()
    if sys.stdout.trouble is not None:
        with suppress(io.UnsupportedOperation):  # no file
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, sys.stdout.fileno())
            os.close(null)
    return sys.stdout.trouble
