"""Ends a run early: after an error, a signal, the death of another rank, or a deadlock.

Finished results are saved, the cause is reported once, and the other ranks are told the reason.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING

from zeroinf.errors import OutputError, RankError, ZeroinfError
from zeroinf.jobs.output_files import journal_path
from zeroinf.runs.interrupts import Interrupts, interrupted
from zeroinf.runs.request_feed import Output
from zeroinf.service.observer import Observer
from zeroinf.sizes import count_text

if TYPE_CHECKING:
    from zeroinf.distributed.watch import PeerWatch


class Shutdown:
    """The early end of a run on one rank: saves finished results, reports the cause once, and tells the other ranks."""

    def __init__(
        self,
        file: Path | None,
        resume_command: str,
        output: Output | None,
        observer: Observer,
        interrupts: Interrupts,
    ) -> None:
        """`file` is the job's output, if it is a file; `output` is there on rank 0."""
        self.watch: PeerWatch | None = None
        self._file, self._resume_command = file, resume_command
        self._output, self._observer, self._interrupts = output, observer, interrupts
        self._saving, self._is_saved = threading.Lock(), False
        self._has_reported = self._has_reported_saved = False
        interrupts.last_resort = lambda number: self.on_error(interrupted(number), reports=True)
        interrupts.at_once = self._at_once

    def finished(self) -> None:
        """The output is published: a run that is stopped from here on has nothing left to save."""
        self._interrupts.last_resort = self._interrupts.at_once = lambda number: None

    def on_error(self, error: BaseException, *, reports: bool = False) -> None:
        """End with `error`. With `reports` it is reported here, since no exception will carry it to the command
        line.
        """
        # A launcher's signal that follows shall not take the place of the cause.
        self._interrupts.deferred, self._interrupts.last_resort = True, lambda number: None
        self._observer.ended()
        # A broken collective, or the signal of a launcher that saw a rank die and stops the others: the cause is
        # elsewhere.
        if self.watch is not None and (isinstance(error, (RankError, RuntimeError)) or self.watch.has_lost_a_peer()):
            self.watch.defer_to_peer_failure()
        if reports:
            self._report(reason_of(error))
        if self._output is not None:
            self._save_results(reason_of(error))
        if self.watch is not None:
            self.watch.publish_exit_reason(
                reason_of(error), error.exit_code if isinstance(error, ZeroinfError) else ZeroinfError.exit_code
            )

    def on_peer_death(self, death: str, reports: bool) -> None:
        """End because another rank died."""
        self._observer.ended()
        if reports:
            self._observer.failed(death)
        if self._output is not None:
            self._save_results(death)
        elif reports and self._file is not None:
            self._report_saved(f"results finished until then are saved in {journal_path(self._file)}")

    def on_deadlock(self, why: str, reports: bool) -> None:
        """End because ranks wait for each other. All of them end, so that none is taken for dead."""
        if self.watch is not None:
            self.watch.stop()
        self.on_peer_death(why, reports)

    def _at_once(self, number: int) -> None:
        """Say what is saved, and wait for nobody: what saves it may be stuck in a write to a disk that hangs."""
        if self._output is None or self._has_reported_saved:
            return
        if not self._has_reported:
            self._report(reason_of(interrupted(number)))
        if self._file is not None:
            durable = self._output.durable
            count = "results finished until then" if durable == 0 else f"{durable} finished results, or more,"
            self._report_saved(f"{count} are saved in {journal_path(self._file)}")

    def _report(self, why: str) -> None:
        self._has_reported = True
        self._observer.failed(why)

    def _save_results(self, why: str) -> None:
        """Once, whichever thread comes first; the other waits until it is said."""
        with self._saving:
            if not self._is_saved:
                self._is_saved = True
                self._save_once(why)

    def _save_once(self, why: str) -> None:
        assert self._output is not None
        try:
            saved = self._output.abandon(why)
        except OutputError as error:
            self._observer.failed(error.message)
            return
        unfinished = self._output.unfinished_tokens
        lost = f"{unfinished:,} tokens of unfinished completions are lost; " if unfinished else ""
        if saved.path is None and self._file is not None and (unfinished or self._interrupts.requested):
            self._report_saved(f"{lost}no request has finished, so there is nothing to save")
        elif saved.path is not None:
            count = count_text(saved.results, "finished result is", "finished results are")
            self._report_saved(f"{lost}{count} saved in {saved.path}")

    def _report_saved(self, what: str) -> None:
        self._has_reported_saved = True
        self._observer.note(f"{what}; to go on: {self._resume_command}")


def reason_of(error: BaseException) -> str:
    """An error in one line."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
