"""Draws a plan as a PNG: memory by term, and tokens/s against the batch size."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from zeroinf.errors import EnvironmentProblem, OutputError
from zeroinf.planner.memory import MemoryPlace, total
from zeroinf.simulation.make_plan import PlanInput, PlanResult
from zeroinf.sizes import gib

_PLACES: tuple[MemoryPlace, ...] = ("gpu", "host", "disk")


def draw_plan(plan_input: PlanInput, found: PlanResult, path: Path) -> None:
    """Write a PNG to `path`. Raises EnvironmentProblem without matplotlib, OutputError where it cannot be written."""
    if find_spec("matplotlib") is None:
        raise EnvironmentProblem("--plot needs matplotlib", hint="pip install 'zeroinf[plot]'")
    try:
        plan_drawing(plan_input, found).savefig(path, format="png", dpi=120)
    except OSError as error:
        raise OutputError(f"--plot {path}: {error.strerror}", hint="choose another name") from error


def plan_drawing(plan_input: PlanInput, found: PlanResult) -> Any:
    """matplotlib's figure: memory by place and term on the left, tokens/s against the batch on the right."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.set_prop_cycle(color=[colormaps["tab20"](index) for index in range(20)])
    labels: list[str] = []
    for place in (place for place in _PLACES if total(found.plan.terms, place)):
        available, bottom = found.decision.budgets[place], 0.0
        for term in (term for term in found.plan.terms if term.place == place):
            share = 100 * term.nbytes / available
            left.bar(len(labels), share, bottom=bottom, label=f"{place}: {term.name}, {gib(term.nbytes)}")
            bottom += share
        labels.append(f"{place}\n{gib(total(found.plan.terms, place))}\nof {gib(available)}")
    left.set_xticks(range(len(labels)), labels)
    left.set_ylabel("% of what is available")
    left.axhline(100, color="black", linestyle="dashed")
    left.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1, 1))
    best: dict[int, float] = {}
    weighed = sorted((*found.decision.tried, found.decision.chosen), key=lambda one: one.choice.batch_size)
    for one in weighed:  # the same batch with more or fewer resident layers
        rows = one.choice.batch_size
        best[rows] = max(best.get(rows, 0.0), one.timing.tokens_per_second)
    right.plot(list(best), list(best.values()), marker="o")
    right.axvline(found.plan.batch_size, color="black", linestyle="dashed")
    right.set_xscale("log", base=2)
    right.set_xlabel("batch on each GPU (dashed: the plan)")
    right.set_ylabel("tokens/s" + (" (estimated)" if found.speeds.projected else ""))
    figure.suptitle(f"{plan_input.anatomy.architecture}, offload {found.plan.offload}")
    return figure
