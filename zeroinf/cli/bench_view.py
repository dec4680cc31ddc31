"""Formats benchmark results, or the list of cells that will run, for the terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import click

from zeroinf.bench.matrix import PRESETS, BenchmarkSettings, Cell
from zeroinf.bench.predict import predict
from zeroinf.bench.results import Results
from zeroinf.bench.table import fields_of, head_of, latencies, pivot, render, table


def shown(results: Results, preset: str | None, form: str) -> str:
    """The outcomes as text, laid out as `preset` says."""
    if form == "json":
        return json.dumps(results.to_json(), indent=1) + "\n"
    shape: Any = form
    layout = PRESETS[preset].layout if preset else None
    if layout is not None:
        return render(pivot(results, layout), shape)
    return render(latencies(results) if preset == "mii" else table(results), shape)


def print_cells(cells: Sequence[Cell], settings: BenchmarkSettings, results: Results, form: Any) -> None:
    """Every cell with how long it should take, or how it ended in `results`."""
    rows = [[*head_of(), "seconds", "tokens/s", "projected"]]
    total_s, unknown, left = 0.0, 0, 0
    for cell in cells:
        if (outcome := results.of(cell)) is not None:
            rows.append([*fields_of(cell), "", "", f"has run: {outcome.status}"])
            continue
        found = predict(cell, settings)
        total_s, unknown, left = total_s + (found.seconds or 0.0), unknown + (found.seconds is None), left + 1
        figures = [f"{v:.1f}" if v is not None else "?" for v in (found.seconds, found.tokens_per_second)]
        rows.append([*fields_of(cell), *figures, found.words])
    click.echo(render(rows, form), nl=False)
    more = f", and {unknown} cells that nobody can time" if unknown else ""
    click.echo(f"{left} cells to run, {total_s / 60:.0f} min projected{more}", err=True)
