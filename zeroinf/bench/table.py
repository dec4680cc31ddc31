"""Formats benchmark results as text: aligned columns, markdown or CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Literal

from zeroinf.bench.matrix import Cell, TableLayout, label
from zeroinf.bench.results import FIGURES, CellResult, Figure, Results, ratio

TableFormat = Literal["human", "md", "csv"]
Rows = Sequence[Sequence[str]]

_CELL_FIELDS = ("model", "engine", "offload", "num_gpus", "batch_size", "input_len", "output_len")
_HEADS = {"num_gpus": "GPUs", "batch_size": "batch", "input_len": "prompt", "output_len": "new", "name": "engine"}


def render(rows: Rows, form: TableFormat) -> str:
    """`rows`, of which the first holds the heads."""
    if form == "csv":
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        return text.getvalue()
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    if form == "md":
        lines.insert(1, ["-" * width for width in widths])
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return "".join(f"{'  '.join(line).rstrip()}\n" for line in lines)


def table(results: Results) -> Rows:
    """A row for each cell, a column for each figure that any cell has."""
    shown = [name for name in FIGURES if any(name in outcome.figures for outcome in results.outcomes)]
    heads = [*head_of(), *(FIGURES[name] for name in shown), "status"]
    return [heads, *(_row(outcome, shown) for outcome in results.outcomes)]


def _row(outcome: CellResult, shown: Sequence[str]) -> list[str]:
    figures = [figure_text(outcome.figures[name]) if name in outcome.figures else "" for name in shown]
    status = outcome.status if outcome.status == "ok" else f"{outcome.status}: {outcome.message}"
    return [*fields_of(outcome.cell), *figures, status]


def pivot(results: Results, layout: TableLayout) -> Rows:
    """One figure, by two fields of the cells; a cell that failed shows how. What else differs stands with the rows."""
    cells = [outcome.cell for outcome in results.outcomes]
    values = {
        (label(o.cell, cells, layout.rows, (layout.columns,)), _at(o, layout.columns)): _value(o, layout.figure)
        for o in results.outcomes
    }
    rows, columns = ([*dict.fromkeys(key[at] for key in values)] for at in (0, 1))
    corner = f"{FIGURES[layout.figure]} by {_HEADS.get(layout.columns, layout.columns)}"
    return [[corner, *columns], *([row, *(values.get((row, column), "") for column in columns)] for row in rows)]


def latencies(results: Results) -> Rows:
    """The layout of the MII benchmark: a row for each cell, tokens/s and the seconds of a repetition."""
    cells = [outcome.cell for outcome in results.outcomes]
    rows = [["model", "engine", "dtype", "tokens/s", "mean s", "std s", "min s", "max s"]]
    for outcome in results.outcomes:
        own = [outcome.cell.model, label(outcome.cell, cells, "name", ("model",))]
        if outcome.report is None:
            rows.append([*own, "", outcome.status, "", "", "", ""])
            continue
        times = Figure(tuple(entry["generate_s"] for entry in outcome.report["repetitions"]))
        spread = (times.mean, times.std, min(times.samples), max(times.samples))
        rate = figure_text(outcome.figures["tokens_per_second"])
        rows.append([*own, str(outcome.report["dtype"]), rate, *(f"{value:.3f}" for value in spread)])
    return rows


def compared(mine: Results, theirs: Results) -> Rows:
    """Tokens/s of the cells that both have: the second over the first, with the spread of the ratio."""
    rows: list[list[str]] = [[*head_of(), "A tokens/s", "B tokens/s", "B / A"]]
    for outcome in mine.outcomes:
        other = theirs.of(outcome.cell)
        if other is None:
            continue
        a, b = (one.figures.get("tokens_per_second") for one in (outcome, other))
        value = ratio_text(b, a) if a is not None and b is not None else ""
        texts = [figure_text(f) if f else one.status for f, one in ((a, outcome), (b, other))]
        rows.append([*fields_of(outcome.cell), *texts, value])
    return rows


def figure_text(figure: Figure) -> str:
    """Mean and spread, with as many digits as say something."""
    digits = 3 if figure.mean < 1 else 2 if figure.mean < 100 else 1
    spread = f" ± {figure.std:.{digits}f}" if len(figure.samples) > 1 else ""
    return f"{figure.mean:,.{digits}f}{spread}"


def ratio_text(mine: Figure, theirs: Figure) -> str:
    """`mine` over `theirs`, and the spread where both have one."""
    value, spread = ratio(mine, theirs)
    return f"{value:.3f} ± {spread:.3f}" if min(len(mine.samples), len(theirs.samples)) > 1 else f"{value:.3f}"


def head_of() -> list[str]:
    """The heads of `fields_of`."""
    return [_HEADS.get(name, name) for name in _CELL_FIELDS]


def fields_of(cell: Cell) -> list[str]:
    """The fields that distinguish a cell from its neighbours; a given prompt has no requested length."""
    return ["given" if getattr(cell, name) is None else str(getattr(cell, name)) for name in _CELL_FIELDS]


def _value(outcome: CellResult, figure: str) -> str:
    return figure_text(outcome.figures[figure]) if figure in outcome.figures else outcome.status


def _at(outcome: CellResult, field: str) -> str:
    return str(getattr(outcome.cell, field))
