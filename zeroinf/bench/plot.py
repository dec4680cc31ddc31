"""Draws benchmark results as a PNG: latency and throughput against the cell field that varies most.

Input: `Results`. Output: a file. Needs matplotlib, which `check_plot` looks for before the long work.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from math import ceil, floor, log10
from pathlib import Path
from typing import Any

from zeroinf.bench.matrix import Cell, label
from zeroinf.bench.plot_style import DARK, DASHES, LIGHT, MARKERS, Theme, plain, style_axis, styled_figure
from zeroinf.bench.results import CellResult, Results
from zeroinf.errors import EnvironmentProblem, OutputError

_PANELS = (("ms_per_token", "milliseconds a token"), ("tokens_per_second", "tokens/s"))
_VARYING = (
    ("batch_size", "sequences of a stream"),
    ("input_len", "prompt tokens"),
    ("model", "model, by its parameters"),
)


def check_plot() -> None:
    """Raises EnvironmentProblem without matplotlib; to be called before the long work."""
    if find_spec("matplotlib") is None:
        raise EnvironmentProblem("--plot needs matplotlib", hint="pip install 'zeroinf[plot]'")


def draw(results: Results, path: Path, *, dark: bool = False) -> None:
    """Write a PNG. Raises OutputError where nothing can be drawn or written."""
    if not any(outcome.figures for outcome in results.outcomes):
        raise OutputError(f"--plot {path}: no cell has a figure", hint="see why the cells failed")
    figure = drawing(results, DARK if dark else LIGHT)
    try:
        figure.savefig(path, format="png", dpi=120)
    except OSError as error:
        raise OutputError(f"--plot {path}: {error.strerror}", hint="choose another name") from error


def drawing(results: Results, theme: Theme = LIGHT) -> Any:
    """matplotlib's figure: two panels, a line for each engine, a point for each cell that has figures."""
    drawn = [outcome for outcome in results.outcomes if outcome.figures]
    cells = [outcome.cell for outcome in drawn]
    varying, words = _varying(drawn)
    lines: dict[str, list[CellResult]] = {}
    for outcome in drawn:
        lines.setdefault(label(outcome.cell, cells, "name", (varying,)), []).append(outcome)
    ticks = {_place(outcome, varying): Path(str(getattr(outcome.cell, varying))).name for outcome in drawn}
    figure = styled_figure(theme, (11.5, 4.8), *_titles(results, cells))
    for axis, (name, title) in zip(figure.subplots(1, 2), _PANELS, strict=True):
        style_axis(axis, theme)
        for index, (legend, outcomes) in enumerate(lines.items()):
            points = sorted((_place(one, varying), one.figures[name].mean, one.figures[name].std) for one in outcomes)
            at, means, spread = zip(*points, strict=True)
            axis.errorbar(
                at, means, spread, label=legend, capsize=3, markersize=6, linewidth=1.8,
                color=theme.lines[index % len(theme.lines)], marker=MARKERS[index % len(MARKERS)],
                linestyle=DASHES[index % len(DASHES)],
            )  # fmt: skip
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.minorticks_off()
        axis.set_xticks(list(ticks), list(ticks.values()), rotation=30 if varying == "model" else 0)
        axis.set_yticks(_ticks([one.figures[name].mean for one in drawn]))
        axis.yaxis.set_major_formatter(plain)
        axis.set_xlabel(words)
        axis.set_title(title, loc="left", fontsize=11, color=theme.text)
    figure.axes[0].legend(frameon=False, fontsize=9.5, labelcolor=theme.text)
    return figure


def _titles(results: Results, cells: Sequence[Cell]) -> tuple[str, str]:
    """The models on the machine, and the job."""
    names = ", ".join(
        name.removeprefix("NVIDIA ") for name in dict.fromkeys(results.machine.get("gpu_names") or ["CPU"])
    )
    models = [Path(model).name for model in dict.fromkeys(cell.model for cell in cells)]
    shown = ", ".join(models) if len(models) < 4 else f"{models[0]} to {models[-1]}"
    prompts, news = (_values(getattr(cell, name) for cell in cells) for name in ("input_len", "output_len"))
    rows = _values(cell.batch_size for cell in cells)
    return f"{shown} on {names}", f"{prompts} prompt and {news} new tokens, {rows} sequences of a stream"


def _values(values: Iterable[Any]) -> str:
    """Different ones of some numbers; a prompt that was given has no number."""
    found = sorted({value for value in values if value is not None})
    return " / ".join(f"{value:,}" for value in found) or "given"


def _ticks(values: Sequence[float]) -> list[float]:
    """Powers of ten around positive values and, where they are few, twice and five times those."""
    low, high = floor(log10(min(values))), ceil(log10(max(values)))
    steps = (1, 2, 5) if high - low <= 2 else (1,)
    return [step * 10.0**power for power in range(low, high + 1) for step in steps]


def _varying(outcomes: list[CellResult]) -> tuple[str, str]:
    """The field of which the cells have most values."""
    counts = {name: len({getattr(outcome.cell, name) for outcome in outcomes}) for name, _ in _VARYING}
    return max(_VARYING, key=lambda one: counts[one[0]])


def _place(outcome: CellResult, varying: str) -> float:
    if varying == "model":
        assert outcome.report is not None
        return float(outcome.report["parameters"]) / 1e6
    return float(getattr(outcome.cell, varying))
