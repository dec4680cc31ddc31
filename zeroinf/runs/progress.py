"""Progress bars of loading and generating for the Python API: on a terminal's stderr, and in notebooks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.status import Status

from zeroinf.planner.plan import Plan
from zeroinf.service import observer
from zeroinf.service.requests import Refusal

_T = TypeVar("_T")


class ProgressObserver:
    """Shows what is being prepared, and how far loading and results are, if `shown`; None: where stderr is a terminal,
    or in a notebook.

    Notes, such as of memory that ran short, are shown everywhere.
    """

    def __init__(self, shown: bool | None) -> None:
        self._console = Console(stderr=True)
        self._shown = (self._console.is_terminal or self._console.is_jupyter) if shown is None else shown
        self._bar: Progress | None = None
        self._step: Status | None = None
        self._counting: Progress | None = None

    def counted(self, found: Iterable[_T], total: int) -> Iterator[_T]:
        """Yield what is `found`, `total` in all, with a bar that `progress` moves."""
        if not self._shown:
            yield from found
            return
        columns = (
            TextColumn("prompts"),
            BarColumn(),
            TextColumn("{task.fields[rows]}"),
            TextColumn("{task.fields[rates]}"),
        )
        with Progress(*columns, console=self._console) as bar:
            bar.add_task("prompts", rows=f"0/{total}", rates="")
            self._counting = bar
            try:
                yield from found
            finally:
                self._counting = None

    def note(self, text: str) -> None:
        self._console.print(f"note: {text}", highlight=False, markup=False, soft_wrap=True)

    def failed(self, text: str) -> None:
        self._console.print(f"error: {text}", highlight=False, markup=False, soft_wrap=True)

    def left_out(self, how: Literal["refused", "failed"], refusals: Sequence[Refusal]) -> None: ...

    def doing(self, step: str) -> None:
        """A step without a measure, such as planning, which takes seconds."""
        if not self._shown or self._bar is not None:
            return
        if self._step is None:
            self._step = self._console.status(step)
            self._step.start()
        else:
            self._step.update(step)

    def fetching(self, name: str) -> None: ...

    def loading(self, plan: Plan) -> None:
        self.ended()
        if self._shown:
            columns = (TextColumn("MiB of weights"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=self._console)
            self._bar.add_task("weights", total=0)
            self._bar.start()

    def filled(self, done_bytes: int, total_bytes: int) -> None:
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done_bytes >> 20, total=total_bytes >> 20)

    def loaded(self, seconds: float) -> None:
        self.ended()

    def progress(self, progress: observer.Progress) -> None:
        if self._counting is not None:
            self._counting.update(
                self._counting.task_ids[0],
                total=progress.tokens + progress.tokens_left,
                completed=progress.tokens,
                rows=f"{progress.rows_done}/{progress.rows}",
                rates=progress.rates,
            )

    def ended(self) -> None:
        if self._step is not None:
            self._step.stop()
            self._step = None
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
