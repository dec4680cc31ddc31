"""`zeroinf eval`: perplexity of a text, to see what a wire format costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from zeroinf.cli.command import command
from zeroinf.cli.environment import option
from zeroinf.cli.params import asked_of, options_of
from zeroinf.cli.waiting import importing
from zeroinf.errors import UsageError
from zeroinf.options.contradictions import refuse_early, refuse_idle
from zeroinf.options.options import EngineOptions, EvaluationLimits, ModelOptions, RestOptions, RunOptions


@command(name="eval", short_help="Measure how well a model predicts a text.")
@options_of(ModelOptions)
@options_of(EngineOptions, only=("wire",))
@options_of(RestOptions)
@option(
    "--text",
    required=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="The text (UTF-8) that the model shall predict.",
)
@option(
    "--window",
    type=click.IntRange(min=2),
    help="Tokens that run together. [default: 512, or as many as the model can]",
)
@options_of(EvaluationLimits)
@option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def eval_(ctx: click.Context, /, text: Path, window: int | None, as_json: bool, **asked: Any) -> None:
    """Measure how well a model predicts a text: perplexity a token and bits a byte.

    The text runs through the same engine as in `zeroinf run`, on one GPU or the CPU, so that a lossy --wire shows its
    cost beside `--wire model`.

    \b
      zeroinf eval --model demo --text book.txt
      zeroinf eval --model demo --text book.txt --wire int4
    """
    from zeroinf.distributed.world import world_from_environment
    from zeroinf.generation.row import Sampling

    options = asked_of(ctx, RunOptions, asked, sampling=Sampling(max_new_tokens=1), engine="stream")
    refuse_idle(options)
    world = world_from_environment()
    if world.size > 1:
        raise UsageError(f"zeroinf eval runs alone, not on {world.size} ranks", hint="start it without a launcher")
    refuse_early(options)
    with importing(quiet=as_json):
        from rich.console import Console

        from zeroinf.cli.console import ConsoleObserver
        from zeroinf.runs.evaluate import evaluate
        from zeroinf.service.device import pick_device

    with ConsoleObserver(Console(stderr=True, soft_wrap=True), quiet=as_json) as observer:
        found = evaluate(options, text, window, pick_device(world), observer)
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
        return
    how = "as the model has them" if found.plan.wire == "model" else f"{found.plan.wire} codes: lossy"
    click.echo(f"perplexity     {found.perplexity:.3f} a token")
    click.echo(f"bits per byte  {found.bits_per_byte:.4f}")
    click.echo(f"weights        {how}, {found.plan.dtype}")
    click.echo(f"speed          {found.tokens_per_second:,.1f} tokens/s")
    click.echo(f"text           {found.text_bytes:,} bytes, {found.tokens:,} tokens in windows of {found.window}")
