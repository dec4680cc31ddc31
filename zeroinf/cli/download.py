"""Implements `zeroinf download`: fetches a model of the hub, so that a run starts at once or without a network."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

import click

from zeroinf.cli.command import command
from zeroinf.cli.environment import option
from zeroinf.cli.params import complete_models
from zeroinf.cli.transfer import transfer_shown
from zeroinf.cli.waiting import waiting
from zeroinf.signals import heeded_signals

if TYPE_CHECKING:
    from zeroinf.model.download import DownloadPlan


@command(short_help="Fetch a model of the hub.")
@click.argument("model", shell_complete=complete_models)
@option("--revision", help="Branch, tag or commit on the hub.")
@option("--trust-remote-code", is_flag=True, help="Fetch Python code that comes with the model, too.")
@option("--dry-run", is_flag=True, help="Say what would be fetched, and fetch nothing.")
@option("-q", "--quiet", is_flag=True, help="No progress; the folder is printed all the same.")
def download(model: str, revision: str | None, trust_remote_code: bool, dry_run: bool, quiet: bool) -> None:
    """Fetch MODEL, a hub id or a name of the catalog, into the cache of Hugging Face's libraries.

    Of its files only config, tokenizer and safetensors are fetched; `.bin` files where there are no safetensors. Room
    on the disk is checked before. Files that are there are not fetched again: after a stop the same command goes on.
    The folder of the files goes to standard output.

    \b
      zeroinf download HuggingFaceTB/SmolLM2-135M-Instruct
      zeroinf download llama-3-70b --dry-run
    """
    from zeroinf.model.download import download as fetch
    from zeroinf.model.download import plan_download
    from zeroinf.sizes import gib

    with waiting("asking the hub", quiet=quiet):
        plan = plan_download(model, revision, trust_remote_code=trust_remote_code)
    what = f"{plan.repository}: {plan.files} files, {gib(plan.total_bytes)}"
    have = f", {gib(plan.total_bytes - plan.missing_bytes)} of it here" if plan.missing_bytes < plan.total_bytes else ""
    if dry_run:
        click.echo(f"{what}{have}, to {plan.folder}")
        return
    if not quiet:
        click.echo(f"{what}{have}", err=True)
    with transfer_shown(plan.missing_bytes, quiet=quiet or not plan.missing_bytes) as moved, _stopped_at_once(plan):
        folder = fetch(plan, moved)
    click.echo(str(folder))


@contextmanager
def _stopped_at_once(plan: DownloadPlan) -> Iterator[None]:
    """A signal that stops runs ends the process: the threads that fetch would go on to the end of their files."""
    from zeroinf.model.download import drop_unfinished

    def stop(number: int, frame: FrameType | None) -> None:
        drop_unfinished(plan)
        lost = "files that are whole stay; the same command fetches the others"
        shown = "\x1b[?25h\r\x1b[2K" if sys.stderr.isatty() else ""  # the cursor again, and no bar
        click.echo(f"{shown}error: stopped by {signal.Signals(number).name}\n\nhint: {lost}", err=True)
        os._exit(128 + number)

    previous = {number: signal.signal(number, stop) for number in heeded_signals()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
