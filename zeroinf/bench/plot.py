"""Results as a picture: latency and throughput against what varies most."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from zeroinf.bench.results import Outcome, Results
from zeroinf.errors import EnvironmentProblem, OutputError

_PANELS = (("ms_per_token", "milliseconds a token"), ("tokens_per_second", "tokens/s"))
_VARYING = (("batch_size", "rows of a stream"), ("input_len", "prompt tokens"), ("model", "parameters, millions"))


def check_plot() -> None:
    """Raises EnvironmentProblem without matplotlib; to be called before the long work."""
    if find_spec("matplotlib") is None:
        raise EnvironmentProblem("--plot needs matplotlib", hint="pip install 'zeroinf[plot]'")


def draw(results: Results, path: Path) -> None:
    """Write a PNG. Raises OutputError where nothing can be drawn."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    drawn = [outcome for outcome in results.outcomes if outcome.figures]
    if not drawn:
        raise OutputError(f"--plot {path}: no cell has a figure", hint="see why the cells failed")
    varying, label = _varying(drawn)
    lines: dict[str, list[Outcome]] = {}
    for outcome in drawn:
        lines.setdefault(_legend(outcome, drawn, varying), []).append(outcome)
    figure, axes = pyplot.subplots(1, 2, figsize=(13, 5), layout="constrained")
    for axis, (name, title) in zip(axes, _PANELS, strict=True):
        for legend, outcomes in lines.items():
            points = sorted(
                ((_place(one, varying), one.figures[name]) for one in outcomes if name in one.figures),
                key=lambda point: point[0],
            )
            spread = [value.std for _, value in points]
            axis.errorbar([at for at, _ in points], [v.mean for _, v in points], spread, marker="o", label=legend)
        axis.set_xscale("log", base=2 if varying != "model" else 10)
        axis.set_yscale("log")
        axis.set_xlabel(label)
        axis.set_ylabel(title)
        axis.grid(True, which="both", alpha=0.3)
    axes[0].legend(fontsize="small")
    names = ", ".join(dict.fromkeys(results.machine.get("gpu_names") or ["CPU"]))
    figure.suptitle(f"{', '.join(dict.fromkeys(o.cell.model for o in drawn))}: {names}", wrap=True, fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _varying(outcomes: list[Outcome]) -> tuple[str, str]:
    """The field of which the cells have most values."""
    counts = {name: len({getattr(outcome.cell, name) for outcome in outcomes}) for name, _ in _VARYING}
    return max(_VARYING, key=lambda one: counts[one[0]])


def _place(outcome: Outcome, varying: str) -> float:
    if varying == "model":
        assert outcome.report is not None
        return float(outcome.report["parameters"]) / 1e6
    return float(getattr(outcome.cell, varying))


def _legend(outcome: Outcome, outcomes: list[Outcome], varying: str) -> str:
    """The engine, and whatever else tells lines apart."""
    words: list[Any] = [outcome.cell.name]
    for name, word in (("model", ""), ("num_gpus", " GPUs"), ("input_len", " in"), ("output_len", " out")):
        if name != varying and len({getattr(other.cell, name) for other in outcomes}) > 1:
            words.append(f"{getattr(outcome.cell, name)}{word}")
    return ", ".join(map(str, words))
