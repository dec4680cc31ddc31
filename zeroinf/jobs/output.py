"""Defines a job and the interface of outputs, which take its results in whatever order they arrive."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from zeroinf.jobs.envelope import Envelope
from zeroinf.jobs.export import OutputFormat
from zeroinf.jobs.work_list import IN_BATCH, WorkList
from zeroinf.service.observer import Progress
from zeroinf.service.requests import Refusal, Result


class Saved(NamedTuple):
    """Results kept by an output that was abandoned: their number, and the file that holds them, if it is a file."""

    path: Path | None
    results: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """The requests of a job, and everything that its results depend on."""

    work: WorkList
    refusals: Sequence[Refusal]
    fingerprint: Mapping[str, str]
    output_format: OutputFormat = "auto"
    model: str = ""
    began: float = field(default_factory=time.time)
    """When its first run did, in seconds since 1970: some chat templates write the date into prompts."""

    @property
    def is_batch(self) -> bool:
        """Whether the input is an OpenAI batch: all that can run comes from its lines."""
        return bool(self.work) and self.work.all(IN_BATCH)

    @property
    def envelope(self) -> Envelope:
        return Envelope(self.model, int(self.began))


class Writer(Protocol):
    """The interface of outputs: results in any order, each once. All methods but `begin` raise OutputError on a failed
    write.
    """

    left: WorkList
    """What is still to be done."""

    def begin(self, ranks: int) -> None:
        """The work begins."""
        ...

    def add(self, result: Result) -> None: ...

    def progress(self, progress: Progress) -> None:
        """Take the run's progress, now and then and at its end."""
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
