"""Prints results in input order: pairs of prompt and completion for people, lines of JSON for programs."""

from __future__ import annotations

import io
import json
import os
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from typing import TextIO

from zeroinf.errors import OutputError
from zeroinf.jobs.output import Job, Saved
from zeroinf.jobs.work_list import WorkList
from zeroinf.service.observer import Progress
from zeroinf.service.requests import Refusal, Result
from zeroinf.sizes import count_text

_DASHES = "-" * 60  # as DeepSpeed's and the BLOOM inference scripts print


class PairsOutput:
    """Prompt and completion for people, `in=` and `out=` and a line of dashes, in input order.

    A request of messages whose result carries no prompt shows its id instead, one that came to nothing is left out.
    Nothing of it can be resumed.
    """

    def __init__(self, stream: TextIO, work: WorkList) -> None:
        self.left = work
        self._stream = stream
        self._encoding = stream.encoding or "utf-8"
        self._order = iter(work.indices)
        self._next = next(self._order, None)
        self._waiting: dict[int, Result] = {}
        self._failures: list[Refusal] = []
        self._printed = 0
        self._is_broken = False

    def begin(self, ranks: int) -> None:
        """Raises OutputError where the stream was closed before the run."""
        try:
            os.write(self._stream.fileno(), b"")
        except io.UnsupportedOperation:  # no file at all
            return
        except OSError as error:
            raise self._unwritable(error) from error

    def add(self, result: Result) -> None:
        """Print `result` and all that waited for it, or keep it until its turn comes; nothing once that has failed."""
        if self._is_broken:
            return
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
            self._failures.append(Refusal.of(self.left.at(index), result.reason))
            return
        self._show(result)

    def _show(self, result: Result) -> None:
        prompt = result.id if result.prompt is None else result.prompt
        self._write(f"in={prompt}\nout={result.completion}\n{_DASHES}\n", 1)

    def _write(self, text: str, results: int) -> None:
        """Print `text`, which tells so many results."""
        try:
            # A terminal that is not UTF-8 shall show an escape, not end the run.
            self._stream.write(text.encode(self._encoding, "backslashreplace").decode(self._encoding))
            self._stream.flush()
        except OSError as error:
            raise self._unwritable(error) from error
        self._printed += results

    def _unwritable(self, error: OSError) -> OutputError:
        self._is_broken = True
        self._waiting.clear()
        printed = count_text(self._printed, "result was", "results were")
        return OutputError(
            f"cannot write to standard output: {error.strerror}; {printed} printed",
            hint="pass --output-file to keep results in a file",
        )


class LinesOutput(PairsOutput):
    """JSON lines for programs, in input order, as soon as they can be told; OpenAI's where the input was a batch."""

    def __init__(self, stream: TextIO, job: Job) -> None:
        super().__init__(stream, job.work)
        self._job = job
        self._envelope = job.envelope if job.output_format == "openai" or job.is_batch else None
        self._choices: list[Result] = []

    def settle(self) -> int:
        return super().settle() + len(self._choices)

    def _print(self, index: int) -> None:
        work = self.left
        at = bisect_left(work.indices, index)
        super()._print(index)
        if at + 1 == len(work) or work[at + 1].id != work[at].id:  # the last one of its entry
            self._flush()

    def _show(self, result: Result) -> None:
        work = self.left.at(result.index)
        extra = self.left.extra(result.index)
        self._choices.append(replace(result, id=work.id, prompt=work.text, extra=extra))

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
            self._write(f"{line}\n", len(choices) // len(lines))

    def abandon(self, why: str) -> Saved:
        """Print what still waits, in input order."""
        saved = super().abandon(why)
        self._flush()
        return saved
