"""`zeroinf ps`: the servers of this user that have names."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from zeroinf.cli.command import command
from zeroinf.cli.environment import option


@command(short_help="List servers that have names.")
@option("--json", "as_json", is_flag=True, help="Print one JSON array.")
def ps(as_json: bool) -> None:
    """List the servers that `zeroinf serve --name` has started on this machine, and that live."""
    from zeroinf.serve.named import all_servers

    servers = all_servers()
    if as_json:
        click.echo(json.dumps([asdict(server) for server in servers], indent=2))
        return
    if not servers:
        click.echo("no server with a name runs here: zeroinf serve --name NAME starts one", err=True)
    for server in servers:
        state = "ready" if server.ready else "loading"
        click.echo(f"{server.name}  {state}  {server.address}  {server.model}  process {server.pid}")
