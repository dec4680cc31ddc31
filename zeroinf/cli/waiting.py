"""Shows a message with a spinner during a wait of seconds. It is shown on terminals only, not in logs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from zeroinf.hardware.process import uncollected


@contextmanager
def waiting(words: str, *, quiet: bool = False) -> Iterator[None]:
    """Show `words` beside something that moves until the block ends; nothing of it stays on the terminal."""
    if quiet or not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(words):
        yield


@contextmanager
def importing(*, quiet: bool = False) -> Iterator[None]:
    """Wait for a block that imports torch and transformers."""
    with uncollected(for_good=True), waiting("starting: importing torch and transformers", quiet=quiet):
        yield
