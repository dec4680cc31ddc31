"""Shows how much of so many bytes has moved: as a redrawn bar on a terminal, as a line now and then in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from zeroinf.sizes import clock, gib

_LINE_EVERY_S = 10.0


@contextmanager
def transfer_shown(total_bytes: int, *, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """A function that takes the bytes so far, and shows them on stderr until the block ends."""
    if quiet:
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    console, started = Console(stderr=True, soft_wrap=True), time.monotonic()

    def words(done: int) -> str:
        seconds = max(time.monotonic() - started, 1e-9)
        left = f", {clock((total_bytes - done) * seconds / done)} left" if 0 < done < total_bytes else ""
        return f"{gib(done)} of {gib(total_bytes)}, {done / seconds / 1e9:.2f} GB/s{left}"

    if not console.is_terminal:
        last = [started]

        def say(done: int) -> None:
            if time.monotonic() - last[0] >= _LINE_EVERY_S or done == total_bytes:
                last[0] = time.monotonic()
                console.print(words(done), highlight=False, markup=False)

        yield say
        return
    with Progress(BarColumn(), TextColumn("{task.description}"), console=console, transient=True) as bar:
        task = bar.add_task(words(0), total=total_bytes)
        yield lambda done: bar.update(task, completed=done, description=words(done))
