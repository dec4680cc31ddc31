"""Implements `zeroinf models`: the models on this machine, with their sizes, and those of the catalog."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from zeroinf.cli.command import command
from zeroinf.cli.environment import option

if TYPE_CHECKING:
    from zeroinf.model.local import LocalModel

JSON_SCHEMA = 1


@command(short_help="List models: on this machine, and known by name.")
@click.argument("word", required=False)
@option("--local", is_flag=True, help="Only models on this machine.")
@option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def models(word: str | None, local: bool, as_json: bool) -> None:
    """List the models on this machine, which run without a network, and those of the catalog, of which
    `zeroinf plan NAME` knows the shapes. With WORD, those whose name or hub id has it.

    \b
      zeroinf models llama
      zeroinf models --local
    """
    from zeroinf.model.local import hub_cache, local_models

    here = [one for one in local_models() if _has(word, one.name)]
    known = [] if local else [row for row in _catalog() if _has(word, row["name"], row["hub_id"])]
    if as_json:
        shown = [
            {"name": one.name, "bytes": one.size_bytes, "quantized": one.quantized, "state": one.state}
            | {"path": str(one.path)}
            for one in here
        ]
        found = {"schema": JSON_SCHEMA, "cache": str(hub_cache()), "local": shown, "catalog": known}
        click.echo(json.dumps(found, indent=2))
        return
    click.echo(f"on this machine ({hub_cache()})")
    _print_rows(("model", "size", "quantized", ""), [_row(one) for one in here])
    if not local:
        click.echo("\ncatalog: shapes that zeroinf plan NAME knows; zeroinf download NAME fetches the weights")
        _print_rows(("name", "parameters", "quantized", "hub id"), [_catalog_row(row) for row in known])


def _catalog() -> list[dict[str, Any]]:
    from zeroinf.model.catalog import catalog_hub_id, catalog_method, catalog_names, catalog_parameters

    return [
        {
            "name": name,
            "hub_id": catalog_hub_id(name),
            "parameters": catalog_parameters(name),
            "quantized": catalog_method(name),
        }
        for name in catalog_names()
    ]


def _has(word: str | None, *texts: str) -> bool:
    return word is None or any(word.lower() in text.lower() for text in texts)


def _row(one: LocalModel) -> tuple[str, ...]:
    from zeroinf.sizes import gib

    wanting = {
        "whole": "",
        "incomplete": f"incomplete: zeroinf download {one.name} goes on",
        "no weights": "config alone, no weights",
    }
    return one.name, gib(one.size_bytes), one.quantized or "-", wanting[one.state]


def _catalog_row(row: dict[str, Any]) -> tuple[str, ...]:
    count = f"{row['parameters'] / 1e9:.3g} billion" if row["parameters"] else "-"
    return row["name"], count, row["quantized"] or "-", row["hub_id"]


def _print_rows(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if not rows:
        click.echo("  none")
        return
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    for row in (titles, *rows):
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        click.echo(f"  {line.rstrip()}")
