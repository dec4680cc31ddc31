"""Results as text: aligned columns, markdown or CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Literal

from zeroinf.bench.matrix import Layout
from zeroinf.bench.results import FIGURES, Figure, Outcome, Results, ratio

Format = Literal["human", "md", "csv"]
Rows = Sequence[Sequence[str]]

_CELL_FIELDS = ("model", "engine", "offload", "num_gpus", "batch_size", "input_len", "output_len")
_HEADS = {"num_gpus": "GPUs", "batch_size": "batch", "input_len": "prompt", "output_len": "new"}


def render(rows: Rows, form: Format) -> str:
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
    heads = [_HEADS.get(name, name) for name in _CELL_FIELDS] + [FIGURES[name] for name in shown] + ["status"]
    return [heads, *(_row(outcome, shown) for outcome in results.outcomes)]


def _row(outcome: Outcome, shown: Sequence[str]) -> list[str]:
    own = [str(getattr(outcome.cell, name)) for name in _CELL_FIELDS]
    figures = [figure_text(outcome.figures[name]) if name in outcome.figures else "" for name in shown]
    return [*own, *figures, outcome.status if outcome.status == "ok" else f"{outcome.status}: {outcome.message}"]


def pivot(results: Results, layout: Layout) -> Rows:
    """One figure, by two fields of the cells; a cell that failed shows how."""
    rows = _unique(str(getattr(outcome.cell, layout.rows)) for outcome in results.outcomes)
    columns = _unique(str(getattr(outcome.cell, layout.columns)) for outcome in results.outcomes)
    values = {(_at(o, layout.rows), _at(o, layout.columns)): _value(o, layout.figure) for o in results.outcomes}
    return [["", *columns], *([row, *(values.get((row, column), "") for column in columns)] for row in rows)]


def latencies(results: Results) -> Rows:
    """The layout of the MII benchmark: a row for each cell, its latencies and their spread in seconds."""
    heads = ["model", "engine", "mean s", "std s", "min s", "max s", "tokens/s"]
    rows = []
    for outcome in results.outcomes:
        own = [outcome.cell.model, outcome.cell.name]
        if outcome.report is None:
            rows.append([*own, outcome.status, "", "", "", ""])
            continue
        times = Figure(tuple(entry["generate_s"] for entry in outcome.report["repetitions"]))
        spread = (times.mean, times.std, min(times.samples), max(times.samples))
        rate = outcome.figures["tokens_per_second"].mean
        rows.append([*own, *(f"{value:.3f}" for value in spread), f"{rate:.1f}"])
    return [heads, *rows]


def compared(mine: Results, theirs: Results) -> Rows:
    """Tokens/s of the cells that both have: the second over the first, with the spread of the ratio."""
    heads = [_HEADS.get(name, name) for name in _CELL_FIELDS]
    rows: list[list[str]] = [[*heads, "A tokens/s", "B tokens/s", "B / A"]]
    for outcome in mine.outcomes:
        other = theirs.of(outcome.cell)
        if other is None:
            continue
        a, b = (one.figures.get("tokens_per_second") for one in (outcome, other))
        value = "{:.3f} ± {:.3f}".format(*ratio(b, a)) if a is not None and b is not None else ""
        texts = [figure_text(f) if f else one.status for f, one in ((a, outcome), (b, other))]
        rows.append([*(str(getattr(outcome.cell, name)) for name in _CELL_FIELDS), *texts, value])
    return rows


def figure_text(figure: Figure) -> str:
    """Mean and spread, with as many digits as say something."""
    digits = 3 if figure.mean < 1 else 2 if figure.mean < 100 else 1
    spread = f" ± {figure.std:.{digits}f}" if len(figure.samples) > 1 else ""
    return f"{figure.mean:,.{digits}f}{spread}"


def _value(outcome: Outcome, figure: str) -> str:
    return figure_text(outcome.figures[figure]) if figure in outcome.figures else outcome.status


def _at(outcome: Outcome, field: str) -> str:
    return str(getattr(outcome.cell, field))


def _unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))
