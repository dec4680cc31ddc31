"""Writes results in input order, whatever the order in which they arrive, to a file with a journal or to standard
output.
"""

from __future__ import annotations

import io
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, Protocol, TextIO

from zeroinf.errors import OutputError
from zeroinf.jobs.envelope import Envelope
from zeroinf.jobs.export import OutputFormat, check_format, column_types, pick_format, writer_for
from zeroinf.jobs.files import content_digest, rename, write_lines, write_new
from zeroinf.jobs.journal import Journal, Runs, read_records
from zeroinf.jobs.matching import kept_results, request_digest
from zeroinf.service.observer import Progress
from zeroinf.service.requests import Extra, Refusal, Result, Work

_OVERWRITE_HINT = "choose another name, or pass --overwrite to discard what is there"
_RESUME_HINT = "pass --resume to go on with it, or --overwrite to discard it"
_PROGRESS_EVERY_S = 5.0
_DASHES = "-" * 60  # as DeepSpeed's and the BLOOM inference scripts print


class Saved(NamedTuple):
    """Results kept by an output that was abandoned: their number, and the file that holds them, if it is a file."""

    path: Path | None
    results: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What a job consists of, and what its results depend on."""

    work: tuple[Work, ...]
    refusals: tuple[Refusal, ...]
    fingerprint: Mapping[str, str]
    extras: Mapping[int, Extra] = field(default_factory=dict)
    """What the output says of requests beside their results, by their index."""
    output_format: OutputFormat = "auto"
    model: str = ""
    began: float = field(default_factory=time.time)
    """When its first run did, in seconds since 1970: some chat templates write the date into prompts."""

    @property
    def is_batch(self) -> bool:
        """Whether the input is an OpenAI batch: all that can run comes from its lines."""
        return bool(self.work) and all(
            (extra := self.extras.get(work.index)) is not None and extra.endpoint is not None for work in self.work
        )

    @property
    def envelope(self) -> Envelope:
        return Envelope(self.model, int(self.began))


class Writer(Protocol):
    """The interface of outputs: results in any order, each once. All methods but `begin` raise OutputError on a failed
    write.
    """

    left: Sequence[Work]
    """What is still to be done."""

    def begin(self, ranks: int) -> None:
        """The work begins."""
        ...

    def add(self, result: Result) -> None: ...

    def progress(self, progress: Progress) -> None:
        """How far the run is, now and then and at its end."""
        ...

    def settle(self) -> int:
        """Make results durable, not too often; how many are, those of earlier runs included."""
        ...

    def finish(self) -> Sequence[Refusal]:
        """All results are there; returns the requests that came to nothing, in input order."""
        ...

    def abandon(self, why: str) -> Saved:
        """Keep what there is."""
        ...


def journal_path(path: Path) -> Path:
    """Where results are as soon as they come, and what a job goes on from."""
    return path.with_name(path.name + ".journal")


def began_before(path: Path) -> float | None:
    """When the job whose output is `path` began, as its journal says; None where there is no such job."""
    if not journal_path(path).is_file():
        return None
    _, first, _ = next(read_records(journal_path(path)), (0, None, 0))
    return None if first is None else first.get("began")


def partial_path(path: Path) -> Path:
    """What becomes the output once it is whole."""
    return path.with_name(path.name + ".partial")


def errors_path(path: Path) -> Path:
    """Where the refusals of a job go."""
    return path.with_name(path.name + ".errors.jsonl")


def check_output(path: Path, *, overwrite: bool, resume: bool, output_format: OutputFormat = "auto") -> None:
    """To be called before the long work.

    Raises OutputError if `path` cannot be written, or if something that is there would be lost; EnvironmentProblem if
    this machine does not write such files.
    """
    check_format(path, output_format)
    try:
        _check_folder(path)
        for file in (path, partial_path(path), errors_path(path), journal_path(path)):
            _check_kind(file)
        if not overwrite:
            _check_nothing_is_lost(path, resume)
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        raise OutputError(f"cannot write {path}: {error.strerror}", hint="choose another name") from error


def _check_folder(path: Path) -> None:
    folder = path.parent
    if path.is_dir():
        raise OutputError(f"{path} is a folder", hint="name a file in it")
    if not folder.is_dir():
        raise OutputError(f"the folder of {path} does not exist", hint=f"mkdir -p {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"the folder of {path} is not writable", hint="choose another folder")


def _check_kind(file: Path) -> None:
    # A link or a device (/dev/stdout is both) would itself be replaced by the finished file.
    if file.is_symlink() or (file.exists() and not file.is_file()):
        raise OutputError(f"{file} is not a regular file", hint="choose another name")


def _check_nothing_is_lost(path: Path, resume: bool) -> None:
    if not journal_path(path).exists():
        for file in (path, partial_path(path), errors_path(path)):
            if file.exists():
                raise OutputError(f"{file} exists already, without a journal", hint=_OVERWRITE_HINT)
    elif path.exists() and not resume:
        raise OutputError(f"{path} exists already", hint=_OVERWRITE_HINT)


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
        self._work = {work.index: work for work in job.work}
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
                raise OutputError(f"{path} exists already, and its journal is empty", hint=_OVERWRITE_HINT)
        except BaseException:
            self._journal.close()
            raise
        done = {} if self._new else self._journal.results
        self.left: Sequence[Work] = tuple(work for work in job.work if work.index not in done)

    @property
    def damaged(self) -> int:
        """Lines of the journal whose checksum does not hold; what they said is done again."""
        return self._journal.damaged

    def _compare(self, resume: bool, anyway: bool) -> None:
        journal, now = self._journal, self._job.fingerprint
        count = len(journal.results)
        if not resume:
            raise OutputError(f"{journal.path} holds {count} results of an earlier run", hint=_RESUME_HINT)
        then = journal.fingerprint
        self.changed = tuple(name for name in {**then, **now} if then.get(name) != now.get(name))
        if self.changed and not anyway:
            what = ", ".join(f"{name} was {then.get(name)}, is {now.get(name)}" for name in self.changed)
            raise OutputError(
                f"{journal.path} holds {count} results of another job: {what}",
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
        failed = [work for work in self._job.work if work.index in journal.failed]
        results = journal.read(work.index for work in failed)
        failures = tuple(Refusal.of(work, result.reason) for work, result in zip(failed, results, strict=True))
        if lines := sorted((*self._job.refusals, *failures), key=lambda refusal: refusal.index):
            failed_ones = {work.index for work in failed}
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
            self._journal.add(result, request_digest(self._work[result.index]))
        except OSError as error:
            raise self._unwritable(error) from error

    def progress(self, progress: Progress) -> None:
        """Journal it, unless another is there since a few seconds. Raises OutputError."""
        now = time.monotonic()
        if progress.tokens_left and now < self._progress_due:
            return
        self._progress_due = now + _PROGRESS_EVERY_S
        told = {name: getattr(progress, name) for name in ("tokens", "tokens_left", "elapsed_s")}
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
        if missing := [work.index for work in self._job.work if work.index not in self._journal.results]:
            raise ValueError(f"index {missing[0]} has no result")
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
        job, columns = self._job, column_types(self._job.extras.values())
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
        """Those of the output, in input order; a request may have had another id when its result came."""
        order = [work for work in self._job.work if work.index not in self._journal.failed]
        for work, result in zip(order, self._journal.read(work.index for work in order), strict=True):
            yield replace(
                result, index=work.index, id=work.id, prompt=work.text, extra=self._job.extras.get(work.index)
            )

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
            f"{what}; {journal.durable} results are saved there", hint="make room or mend it, then --resume"
        )


class PairsOutput:
    """Prompt and completion for people, `in=` and `out=` and a line of dashes, in input order.

    A request of messages whose result carries no prompt shows its id instead, one that came to nothing is left out.
    Nothing of it can be resumed.
    """

    def __init__(self, stream: TextIO, work: Sequence[Work]) -> None:
        self.left = work
        self._stream = stream
        self._encoding = stream.encoding or "utf-8"
        self._work = {work.index: work for work in work}
        self._order = iter(self._work)
        self._next = next(self._order, None)
        self._waiting: dict[int, Result] = {}
        self._failures: list[Refusal] = []
        self._printed = 0

    def begin(self, ranks: int) -> None:
        """Raises OutputError where the stream was closed before the run."""
        try:
            os.write(self._stream.fileno(), b"")
        except io.UnsupportedOperation:  # no file at all
            return
        except OSError as error:
            raise self._unwritable(error) from error

    def add(self, result: Result) -> None:
        """Print `result` and all that waited for it, or keep it until its turn comes."""
        self._waiting[result.index] = result
        while self._next in self._waiting:
            self._print(self._next)
            self._next = next(self._order, None)

    def progress(self, progress: Progress) -> None: ...

    def settle(self) -> int:
        return self._printed + len(self._failures) + len(self._waiting)

    def finish(self) -> Sequence[Refusal]:
        """Raises ValueError if a result is missing."""
        if self._next is not None:
            raise ValueError(f"index {self._next} has no result")
        return self._failures

    def abandon(self, why: str) -> Saved:
        """Print what still waits, in input order."""
        for index in sorted(self._waiting):
            self._print(index)
        return Saved(None, self._printed)

    def _print(self, index: int) -> None:
        result = self._waiting.pop(index)
        if result.failed:
            self._failures.append(Refusal.of(self._work[index], result.reason))
            return
        self._show(result)
        self._printed += 1

    def _show(self, result: Result) -> None:
        self._write(f"in={result.id if result.prompt is None else result.prompt}\nout={result.completion}\n{_DASHES}\n")

    def _write(self, text: str) -> None:
        try:
            # A terminal that is not UTF-8 shall show an escape, not end the run.
            self._stream.write(text.encode(self._encoding, "backslashreplace").decode(self._encoding))
            self._stream.flush()
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> OutputError:
        self._waiting.clear()
        return OutputError(
            f"cannot write to standard output: {error.strerror}; {self._printed} results were printed",
            hint="pass --output-file to keep results in a file",
        )


class LinesOutput(PairsOutput):
    """JSON lines for programs, in input order, as soon as they can be told; OpenAI's where the input was a batch."""

    def __init__(self, stream: TextIO, job: Job) -> None:
        super().__init__(stream, job.work)
        self._job = job
        self._envelope = job.envelope if job.output_format == "openai" or job.is_batch else None
        ids = [work.id for work in job.work]
        following = zip(job.work, [*ids[1:], None], strict=True)
        self._last = {work.index for work, after in following if work.id != after}
        """Requests that are the last one of their entries."""
        self._choices: list[Result] = []

    def _print(self, index: int) -> None:
        super()._print(index)
        if index in self._last:
            self._flush()

    def _show(self, result: Result) -> None:
        work = self._work[result.index]
        self._choices.append(replace(result, id=work.id, prompt=work.text, extra=self._job.extras.get(work.index)))

    def _flush(self) -> None:
        """Write the completions of one entry."""
        choices, self._choices = self._choices, []
        if not choices:
            return
        lines = [one.to_line() for one in choices] if self._envelope is None else [self._envelope.line(choices)]
        for line in lines:
            try:
                line.encode(self._encoding)
            except UnicodeEncodeError:  # JSON has escapes of its own
                line = json.dumps(json.loads(line))
            self._write(f"{line}\n")

    def abandon(self, why: str) -> Saved:
        """Print what still waits, in input order."""
        saved = super().abandon(why)
        self._flush()
        return saved
