"""Writes results to a file: into its journal as they come, and in input order once all are there."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from heapq import merge
from pathlib import Path

from zeroinf.errors import OutputError
from zeroinf.jobs.export import column_types, pick_format, writer_for
from zeroinf.jobs.files import content_digest, rename, write_lines, write_new
from zeroinf.jobs.fingerprint import is_digest
from zeroinf.jobs.journal import Journal, Runs
from zeroinf.jobs.matching import kept_results, request_digest
from zeroinf.jobs.output import Job, Saved
from zeroinf.jobs.output_files import (
    OVERWRITE_HINT,
    RESUME_HINT,
    check_output,
    errors_path,
    journal_path,
    partial_path,
)
from zeroinf.service.observer import Progress
from zeroinf.service.requests import Refusal, Result
from zeroinf.sizes import count_text

_PROGRESS_EVERY_S = 5.0


class JournalOutput:
    """One line a result in `path`, one a refusal or a request that came to nothing in `<path>.errors.jsonl`.

    Until `finish`, results are in `<path>.journal`: `path` is complete or not there at all. The journal stays.
    """

    def __init__(self, path: Path, job: Job, *, overwrite: bool, resume: bool, resume_anyway: bool) -> None:
        """Take hold of the journal and see what is left; nothing is written before `begin`.

        Raises OutputError as `check_output` does, where another run holds the journal, where it has results and neither
        `overwrite` nor `resume` says what to do with them, where it is another job's, unless `resume_anyway`, and where
        the output of a finished job is no longer what was written.
        """
        check_output(path, overwrite=overwrite, resume=resume, output_format=job.output_format)
        self._format = pick_format(path, job.output_format, is_batch=job.is_batch)
        self._path, self._job, self._overwrite = path, job, overwrite
        self._kept: Runs = ()
        self._progress_due = 0.0
        self._begun = self._new = self._is_lost = False
        self.changed: tuple[str, ...] = ()
        """Fields in which this run differs from the one that it goes on from."""
        try:
            self._journal = Journal(journal_path(path))
        except OSError as error:
            raise OutputError(f"cannot write {journal_path(path)}: {error.strerror}") from error
        try:
            self._new = overwrite or not (self._journal.results or self._journal.published)
            if not self._new:
                self._compare(resume, resume_anyway)
            elif path.exists() and not overwrite:
                raise OutputError(f"{path} exists already, and its journal is empty", hint=OVERWRITE_HINT)
        except BaseException:
            self._journal.close()
            raise
        done = () if self._new else self._journal.results
        self.left = job.work.selected(at for at, index in enumerate(job.work.indices) if index not in done)

    @property
    def damaged(self) -> int:
        """Lines of the journal whose checksum does not hold; what they said is done again."""
        return self._journal.damaged

    @property
    def failed(self) -> Collection[int]:
        """Indices of requests that have come to nothing so far."""
        return self._journal.failed

    def _compare(self, resume: bool, anyway: bool) -> None:
        journal, now = self._journal, self._job.fingerprint
        count = count_text(len(journal.results), "result", "results")
        if not resume:
            raise OutputError(f"{journal.path} holds {count} of an earlier run", hint=RESUME_HINT)
        then = journal.fingerprint
        self.changed = tuple(name for name in {**then, **now} if then.get(name) != now.get(name))
        if self.changed and not anyway:
            what = "; ".join(_difference(name, then.get(name), now.get(name)) for name in self.changed)
            raise OutputError(
                f"{journal.path} holds {count} of another job: {what}",
                hint="run it as it was, pass --resume-anyway to mix both in one output, or --overwrite to start anew",
            )
        if self.changed:
            self._kept = kept_results(journal.requests(), self._job.work)
            journal.keep(self._kept)
        if journal.published and self._path.exists() and content_digest(self._path) != journal.published:
            raise OutputError(
                f"{self._path} was changed since the job was finished",
                hint="move it away, then --resume, which writes it again; or pass --overwrite to start anew",
            )

    def begin(self, ranks: int) -> None:
        """Write who is at work, and what is refused or has failed so far. Raises OutputError."""
        self._begun = True
        job, journal = self._job, self._journal
        session = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "ranks": ranks,
            "requests": len(job.work),
            "refused": len(job.refusals),
        }
        if self.changed:
            session |= {"changed": self.changed, "fingerprint": job.fingerprint, "kept": self._kept}
        try:
            if self._new:
                replaces = self._overwrite and self._path.exists()
                journal.start({"replaces": replaces, "began": job.began, "fingerprint": job.fingerprint})
            journal.note(session=session)
            journal.sync()
            self._write_errors()
        except OSError as error:
            raise self._unwritable(error) from error

    def _write_errors(self) -> tuple[Refusal, ...]:
        """Refusals, and the requests that have come to nothing so far; returns the latter."""
        journal, errors, partial = self._journal, errors_path(self._path), partial_path(self._path)
        failed = [index for index in self._job.work.indices if index in journal.failed]
        failures = tuple(
            Refusal.of(self._job.work.at(index), result.reason)
            for index, result in zip(failed, journal.read(failed), strict=True)
        )
        if failures or self._job.refusals:
            lines = merge(self._job.refusals, failures, key=lambda refusal: refusal.index)
            failed_ones = set(failed)
            write_new(partial, write_lines(self._error_line(one, one.index in failed_ones) for one in lines))
            rename(partial, errors)
        elif errors.exists():
            errors.unlink()
        return failures

    def _error_line(self, refusal: Refusal, failed: bool) -> str:
        as_batch = self._format == "openai"
        return self._job.envelope.error(refusal, failed=failed) if as_batch else refusal.to_line()

    def add(self, result: Result) -> None:
        """Journal it. Raises OutputError, or ValueError where its index has a result already."""
        try:
            self._journal.add(result, request_digest(self._job.work.at(result.index)))
        except OSError as error:
            raise self._unwritable(error) from error

    def progress(self, progress: Progress) -> None:
        """Journal it, unless another is there since a few seconds. Raises OutputError."""
        now = time.monotonic()
        if progress.tokens_left and now < self._progress_due:
            return
        self._progress_due = now + _PROGRESS_EVERY_S
        told = {name: getattr(progress, name) for name in ("tokens", "tokens_left", "elapsed_s")}
        if progress.nodes:
            told["nodes"] = progress.nodes
        if progress.expected_s is not None:
            told["expected_s"] = progress.expected_s
        try:
            self._journal.note(progress=told)
        except OSError as error:
            raise self._unwritable(error) from error

    def settle(self) -> int:
        """Make results durable if that is due; how many are."""
        try:
            self._journal.sync_if_due()
        except OSError as error:
            raise self._unwritable(error) from error
        return self._journal.durable

    def finish(self) -> Sequence[Refusal]:
        """Publish the output. Raises OutputError, or ValueError if a result is missing."""
        done = self._journal.results
        if (missing := next((index for index in self._job.work.indices if index not in done), None)) is not None:
            raise ValueError(f"index {missing} has no result")
        failures: Sequence[Refusal] = ()
        if self.changed and not self._begun:  # with nothing to run: requests are gone, or stand elsewhere
            self.begin(0)
        try:
            self._journal.sync()
            if self._journal.failed or not self._begun:  # what earlier runs had written may be gone since
                failures = self._write_errors()
            self._publish()
        except OSError as error:
            raise self._unwritable(error) from error
        self._journal.close()
        return failures

    def _publish(self) -> None:
        partial, path, journal = partial_path(self._path), self._path, self._journal
        job, columns = self._job, column_types(self._job.work.extras())
        write_new(partial, writer_for(self._format, self._results(), columns, job.envelope))
        digest = content_digest(partial)
        assert journal.manifest is not None
        may_go = bool(journal.manifest["replaces"]) and not journal.published
        if path.exists() and not may_go and content_digest(path) not in (journal.published, digest):
            raise OutputError(
                f"{path} was made by another program during the run, or changed since",
                hint=f"move it away, then --resume; until then all results are in {partial}",
            )
        rename(partial, path)
        if journal.published != digest or self._begun:
            journal.note(published=digest)
            journal.sync()

    def _results(self) -> Iterator[Result]:
        """The output's results, in input order; a request may have had another id when its result came."""
        work, failed = self._job.work, self._journal.failed
        order = work.selected(at for at, index in enumerate(work.indices) if index not in failed)
        for (one, extra), result in zip(order.with_extras(), self._journal.read(order.indices), strict=True):
            yield replace(result, index=one.index, id=one.id, prompt=one.text, extra=extra)

    def abandon(self, why: str) -> Saved:
        """Keep what is done, with the reason why it is not more; a journal of which nothing depends goes."""
        journal = self._journal
        if self._is_lost:
            journal.close()
            return Saved(None, 0)
        if not journal.results and not (self._begun and self._job.refusals):
            journal.discard()
            return Saved(None, 0)
        if self._begun:
            with suppress(OSError):  # then it is as durable as it was
                journal.note(ended=why)
                journal.sync()
        journal.close()
        return Saved(journal.path, journal.durable if self._begun or not self._new else 0)

    def _unwritable(self, error: OSError) -> OutputError:
        journal = self._journal
        what = f"cannot write {journal.path}: {error.strerror}"
        if isinstance(error, FileNotFoundError):
            try:
                journal.rescue()
                what += "; all results have been written there again"
            except OSError as again:
                self._is_lost = True
                return OutputError(f"{what}, and it cannot be written again: {again.strerror}")
        return OutputError(
            f"{what}; {count_text(journal.durable, 'result is', 'results are')} saved there",
            hint="free space or fix the problem, then --resume",
        )


def _difference(name: str, then: str | None, now: str | None) -> str:
    """A field of the fingerprint that has changed: its values, where they say something to people."""
    return f"{name} changed" if is_digest(then) or is_digest(now) else f"{name} was {then}, is {now}"
