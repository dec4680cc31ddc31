"""Opens a job and ends it, however it is run: by the ranks of this run, or by the nodes of a cluster.

`open_job` reads the input, takes hold of the output and says what is left to do; `outcome_of` says what came of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TextIO, TypeVar

from zeroinf.errors import RequestsFailedError
from zeroinf.jobs.journal_output import JournalOutput
from zeroinf.jobs.output import Job, Writer
from zeroinf.jobs.output_files import errors_path, journal_path
from zeroinf.jobs.readers import none_can_run
from zeroinf.jobs.stream_output import LinesOutput, PairsOutput
from zeroinf.jobs.work_list import KNOWN_END, WorkList
from zeroinf.model.source import ModelSource
from zeroinf.options.options import RunOptions
from zeroinf.runs.prepare import JobInput, read_job
from zeroinf.runs.report import RunOutcome, RunReport
from zeroinf.runs.request_feed import Output
from zeroinf.runs.shutdown import reason_of
from zeroinf.service.observer import Observer
from zeroinf.service.requests import Refusal
from zeroinf.sizes import DEFAULT_NEW_TOKENS, count_text

_Prepared = TypeVar("_Prepared")


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenedJob(Generic[_Prepared]):
    """A job whose output this process holds."""

    job: Job
    writer: Writer
    prepared: _Prepared | None
    """None where there is nothing to run: all is done, or refused."""


def open_job(
    options: RunOptions,
    source: ModelSource,
    device: str,
    results: TextIO,
    observer: Observer,
    prepare: Callable[[JobInput, WorkList], _Prepared],
    ranks: int,
) -> OpenedJob[_Prepared]:
    """Read the requests, and `prepare` to run what earlier runs have not done; the journal says that `ranks` begin.

    Results go to the options' output file, or to `results` where there is none. Raises the error of whatever does not
    hold; the output is given back then.
    """
    observer.doing("reading the requests")
    reading = read_job(options, source, device)
    job = reading.job
    observer.left_out("refused", job.refusals)
    for note in reading.notes:
        observer.note(note)
    writer = _open_output(options, job, results, observer)
    try:
        if job.work and not writer.left:
            observer.note(f"all {len(job.work)} requests were done by earlier runs")
            return OpenedJob(job=job, writer=writer, prepared=None)
        observer.doing("planning")
        prepared = prepare(reading, writer.left) if job.work else None
        writer.begin(ranks)
        _check_error_rate(options, job)
    except BaseException as error:
        writer.abandon(reason_of(error))
        raise
    return OpenedJob(job=job, writer=writer, prepared=prepared)


def outcome_of(
    options: RunOptions,
    job: Job,
    output: Output,
    failures: Sequence[Refusal],
    report: RunReport | None,
    observer: Observer,
) -> RunOutcome:
    """The outcome of a job whose output is published. Raises RequestsFailedError where every request was refused."""
    if not job.work:
        where = f"see {errors_path(options.output_file)}" if options.output_file is not None else None
        raise RequestsFailedError(none_can_run(job.refusals), hint=where)
    if (note := _cut_note(job.work, output)) is not None:
        observer.note(note)
    if output.cut_answers:
        observer.note(
            f"answers cut before they had their format: {output.cut_answers} of {output.results} "
            '(finish_reason "length"); --max-new-tokens sets more tokens'
        )
    done = len(job.work) - len(failures)
    if done:  # else they have failed as one, and the command line says so once
        observer.left_out("failed", failures)
    return RunOutcome(
        requests=done,
        refused=len(job.refusals),
        failed=len(failures),
        report=report,
        why_failed=next((one.reason for one in failures), ""),
    )


def _cut_note(work: WorkList, output: Output) -> str | None:
    """The note for a run most of whose completions were cut at the default length; None for any other."""
    lengths = set(work.having(KNOWN_END).new_tokens)
    if lengths != {DEFAULT_NEW_TOKENS} or 2 * output.cut <= output.results:
        return None
    return (
        f"{output.cut} of {output.results} completions were cut at the default of {DEFAULT_NEW_TOKENS} tokens: "
        "--max-new-tokens sets another"
    )


def _open_output(options: RunOptions, job: Job, results: TextIO, observer: Observer) -> Writer:
    if options.output_file is None:
        return LinesOutput(results, job) if options.to_stdout else PairsOutput(results, job.work)
    output = JournalOutput(
        options.output_file,
        job,
        overwrite=options.overwrite,
        resume=options.resume,
        resume_anyway=options.resume_anyway,
    )
    done = len(job.work) - len(output.left)
    if output.damaged:
        lines = count_text(output.damaged, "line is", "lines are")
        observer.note(f"{lines} damaged in {journal_path(options.output_file)}: their requests run again")
    if options.resume and job.work:
        observer.note(f"resuming with {done} of {len(job.work)} results" if done else "nothing to resume: a new job")
    if output.changed:
        observer.note(f"this output mixes results of two jobs, which differ in {', '.join(output.changed)}")
    return output


def _check_error_rate(options: RunOptions, job: Job) -> None:
    refused, count = len(job.refusals), len(job.refusals) + len(job.work)
    if refused / count > options.max_error_rate:
        where = f"see {errors_path(options.output_file)}" if options.output_file else "their reasons stand above"
        raise RequestsFailedError(
            f"{refused} of {count} requests were refused, more than --max-error-rate {options.max_error_rate:g}",
            hint=f"{where}; nothing was run",
        )
