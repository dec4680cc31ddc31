"""`zeroinf store`: the weights that runs with --offload nvme have written, and may be removed again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from zeroinf.cli.command import group
from zeroinf.cli.environment import option
from zeroinf.errors import StoreError, UsageError

if TYPE_CHECKING:
    from zeroinf.engines.stream.manage_stores import StoreSummary

JSON_SCHEMA = 1

_Command = TypeVar("_Command", bound=Callable[..., Any])


@group(short_help="List, verify or remove weights that are stored on NVMe.")
def store() -> None:
    """List, verify or remove the stores of weights that `zeroinf run --offload nvme` writes once and finds again.

    \b
      zeroinf store list --nvme-path /local
      zeroinf store verify --nvme-path /local
      zeroinf store remove 0123456789ab-0123456789ab --nvme-path /local
    """


def _paths(command: _Command) -> _Command:
    return option(
        "--nvme-path",
        "paths",
        type=click.Path(path_type=Path, exists=True, file_okay=False),
        multiple=True,
        required=True,
        help="Folder that stores lie below; name all over which a store is striped.",
    )(command)


@store.command(name="list")
@_paths
@option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def list_(paths: tuple[Path, ...], as_json: bool) -> None:
    """Show every store below the given folders."""
    from zeroinf.engines.stream.manage_stores import list_stores

    found = list_stores(paths)
    if as_json:
        click.echo(_as_json(found))
    elif found:
        _print_table(found)
    else:
        click.echo(f"no stores below {', '.join(map(str, paths))}", err=True)


@store.command()
@click.argument("names", nargs=-1)
@_paths
def verify(names: tuple[str, ...], paths: tuple[Path, ...]) -> None:
    """Read stores (all, or those named) and compare every byte's digest. Exits with 1 if one is damaged."""
    from zeroinf.engines.stream.manage_stores import list_stores

    idle = ("unfinished", "unused")
    chosen = names or tuple(summary.name for summary in list_stores(paths) if summary.state not in idle)
    failed = [error for name in chosen if (error := _verify_one(name, paths)) is not None]
    if failed:
        raise StoreError(f"{len(failed)} of {len(chosen)} stores are damaged", hint=failed[0].hint)


@store.command()
@click.argument("names", nargs=-1, required=True)
@_paths
@option("--yes", is_flag=True, help="Do not ask.")
def remove(names: tuple[str, ...], paths: tuple[Path, ...], yes: bool) -> None:
    """Remove stores. A later run that needs one writes it again."""
    from zeroinf.engines.stream.manage_stores import list_stores, remove_store
    from zeroinf.sizes import gib

    known = {summary.name: summary for summary in list_stores(paths)}
    for name in names:
        if name not in known:
            raise UsageError(f"no store {name} below the given folders", hint="zeroinf store list shows them")
        what = f"{name} ({known[name].model or known[name].state}, {gib(known[name].disk_bytes)})"
        if not yes and not click.confirm(f"remove {what}?", err=True):
            continue
        remove_store(paths, name)
        click.echo(f"removed {what}", err=True)


def _verify_one(name: str, paths: tuple[Path, ...]) -> StoreError | None:
    import time

    from zeroinf.engines.stream.manage_stores import find_store, verify_store
    from zeroinf.sizes import gib

    started = time.perf_counter()
    sizes: list[int] = []
    try:
        verify_store(find_store(paths, name), sizes.append)
    except StoreError as error:
        click.echo(f"{name}  damaged: {error.message}")
        return error
    seconds = time.perf_counter() - started
    click.echo(f"{name}  ok, {gib(sum(sizes))} read at {sum(sizes) / seconds / 1e9:.2f} GB/s")
    return None


def _as_json(found: list[StoreSummary]) -> str:
    import json
    from dataclasses import asdict

    return json.dumps({"schema": JSON_SCHEMA, "stores": [asdict(s) for s in found]}, indent=2, default=str)


def _print_table(found: list[StoreSummary]) -> None:
    from rich.console import Console
    from rich.table import Table

    from zeroinf.sizes import gib

    table = Table("name", "model", "dtype", "wire", "size", "state", box=None, pad_edge=False)
    for s in found:
        table.add_row(s.name, s.model or "?", s.dtype or "?", s.wire or "?", gib(s.disk_bytes), s.state)
    console = Console(soft_wrap=True, highlight=False)
    console.print(table)
    for s in found:
        if s.detail:
            console.print(f"{s.name}: {s.detail}", markup=False)
