"""`zeroinf stop`: end a server that has a name."""

from __future__ import annotations

import click

from zeroinf.cli.command import command
from zeroinf.cli.environment import option
from zeroinf.cli.params import FiniteFloat


@command(short_help="Stop a server that has a name.")
@click.argument("name")
@option("--grace-seconds", type=FiniteFloat(min=0), help="End it at once after so long. [default: wait]")
def stop(name: str, grace_seconds: float | None) -> None:
    """Let a server that `zeroinf serve --name` has started end what is under way, and wait until it is gone."""
    from zeroinf.serve.named import stop_server

    stop_server(name, grace_seconds)
