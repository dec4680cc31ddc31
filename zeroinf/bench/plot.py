"""Draws benchmark results as a PNG: latency and throughput against the cell field that varies most.

Input: `Results`. Output: a file. Needs matplotlib, which `check_plot` looks for before the long work.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from zeroinf.bench.matrix import label
from zeroinf.bench.results import CellResult, Results
from zeroinf.errors import EnvironmentProblem, OutputError

_PANELS = (("ms_per_token", "milliseconds a token"), ("tokens_per_second", "tokens/s"))
_VARYING = (("batch_size", "rows of a stream"), ("input_len", "prompt tokens"), ("model", "model, by its parameters"))


def check_plot() -> None:
    """Raises EnvironmentProblem without matplotlib; to be called before the long work."""
    if find_spec("matplotlib") is None:
        raise EnvironmentProblem("--plot needs matplotlib", hint="pip install 'zeroinf[plot]'")


def draw(results: Results, path: Path) -> None:
    """Write a PNG. Raises OutputError where nothing can be drawn or written."""
    if not any(outcome.figures for outcome in results.outcomes):
        raise OutputError(f"--plot {path}: no cell has a figure", hint="see why the cells failed")
    figure = drawing(results)
    try:
        figure.savefig(path, format="png", dpi=120)
    except OSError as error:
        raise OutputError(f"--plot {path}: {error.strerror}", hint="choose another name") from error


def drawing(results: Results) -> Any:
    """matplotlib's figure: two panels, a line for each engine, a point for each cell that has figures."""
    from matplotlib.figure import Figure

    drawn = [outcome for outcome in results.outcomes if outcome.figures]
    cells = [outcome.cell for outcome in drawn]
    varying, words = _varying(drawn)
    lines: dict[str, list[CellResult]] = {}
    for outcome in drawn:
        lines.setdefault(label(outcome.cell, cells, "name", (varying,)), []).append(outcome)
    ticks = {_place(outcome, varying): Path(str(getattr(outcome.cell, varying))).name for outcome in drawn}
    figure = Figure(figsize=(13, 5), layout="constrained")
    for axis, (name, title) in zip(figure.subplots(1, 2), _PANELS, strict=True):
        for legend, outcomes in lines.items():
            points = sorted((_place(one, varying), one.figures[name].mean, one.figures[name].std) for one in outcomes)
            at, means, spread = zip(*points, strict=True)
            axis.errorbar(at, means, spread, marker="o", capsize=3, label=legend)
        axis.set_xscale("log")
        axis.minorticks_off()
        axis.set_xticks(list(ticks), list(ticks.values()), rotation=30 if varying == "model" else 0)
        axis.set_yscale("log")
        axis.set_xlabel(words)
        axis.set_ylabel(title)
        axis.grid(True, alpha=0.3)
    figure.axes[0].legend(fontsize="small")
    names = ", ".join(dict.fromkeys(results.machine.get("gpu_names") or ["CPU"]))
    figure.suptitle(f"{', '.join(dict.fromkeys(c.model for c in cells))}: {names}", wrap=True, fontsize="small")
    return figure


def _varying(outcomes: list[CellResult]) -> tuple[str, str]:
    """The field of which the cells have most values."""
    counts = {name: len({getattr(outcome.cell, name) for outcome in outcomes}) for name, _ in _VARYING}
    return max(_VARYING, key=lambda one: counts[one[0]])


def _place(outcome: CellResult, varying: str) -> float:
    if varying == "model":
        assert outcome.report is not None
        return float(outcome.report["parameters"]) / 1e6
    return float(getattr(outcome.cell, varying))
