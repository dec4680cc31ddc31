"""`zeroinf status`: how far a job is, while it runs or after."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from zeroinf.cli.command import command
from zeroinf.cli.environment import option
from zeroinf.errors import UsageError
from zeroinf.sizes import clock

if TYPE_CHECKING:
    from zeroinf.jobs.status import JobStatus
    from zeroinf.service.requests import Result

JSON_SCHEMA = 1

_WATCH_EVERY_S = 2.0


@command(short_help="How far a job is.")
@click.argument("file", type=click.Path(path_type=Path))
@option("--watch", is_flag=True, help="Say it again every 2 s, until the job is finished or stops.")
@option("--json", "as_json", is_flag=True, help="Print one JSON object; with --watch one a line.")
@option(
    "--tail",
    is_flag=True,
    help="Print the results that have come so far, one JSON object a line; with --watch those to come as well.",
)
def status(file: Path, watch: bool, as_json: bool, tail: bool) -> None:
    """Show what is done and left of the job whose output is FILE. It may be running, stopped or finished.

    \b
      zeroinf status out.jsonl --watch
      zeroinf status out.jsonl --tail > so-far.jsonl
    """
    from zeroinf.jobs.output_files import journal_path
    from zeroinf.jobs.status import StatusReader

    if tail and as_json:
        raise UsageError("--tail and --json contradict each other", hint="results are JSON already: drop --json")
    journal = file if file.suffix == ".journal" else journal_path(file)
    reader = StatusReader(journal, _print_result) if tail else StatusReader(journal)
    while True:
        now = reader.read()
        click.echo(_as_json(now) if as_json else _in_words(now), err=tail)
        if not watch or now.state != "running":
            return
        time.sleep(_WATCH_EVERY_S)


def _print_result(result: Result) -> None:
    if not result.failed:
        click.echo(result.to_line())


def _in_words(now: JobStatus) -> str:
    counts = f"{now.state}: {now.done} done, {now.failed} failed, {now.left} left"
    rate = f", {now.tokens:,} tokens, {now.tokens_per_second:,.1f} tokens/s" if now.tokens else ""
    if now.left_s is not None:
        rate += f", {clock(now.left_s)} left"
    if now.nodes and now.state == "running":
        rate += f", {now.nodes} node{'s' * (now.nodes > 1)}"
    error = f"\nlast error: {now.last_error}" if now.last_error and now.state == "stopped" else ""
    mixed = f"\nresults of jobs that differ in {', '.join(now.changed)}" if now.changed else ""
    return counts + rate + mixed + error


def _as_json(now: JobStatus) -> str:
    fields = {**asdict(now), "tokens_per_second": now.tokens_per_second, "left_s": now.left_s}
    return json.dumps({"schema": JSON_SCHEMA, **fields}, default=str)
