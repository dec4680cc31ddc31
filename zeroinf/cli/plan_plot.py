"""A plan as a picture: memory by term, and tokens/s against the batch."""

from __future__ import annotations

from pathlib import Path

from zeroinf.errors import EnvironmentProblem
from zeroinf.planner.memory import Place
from zeroinf.simulation.planning import Answer, Question

_PLACES: tuple[Place, ...] = ("gpu", "host", "disk")


def draw_plan(question: Question, found: Answer, path: Path) -> None:
    """Write a PNG to `path`. Raises EnvironmentProblem where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError as error:
        raise EnvironmentProblem("--plot needs matplotlib", hint="pip install 'zeroinf[plot]'") from error
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    places = [place for place in _PLACES if place in found.decision.budgets]
    for at, place in enumerate(places):
        bottom = 0.0
        for term in (term for term in found.plan.terms if term.place == place):
            left.bar(at, term.nbytes / 2**30, bottom=bottom, label=f"{place}: {term.name}")
            bottom += term.nbytes / 2**30
        left.hlines(found.decision.budgets[place] / 2**30, at - 0.45, at + 0.45, colors="black", linestyles="dashed")
    left.set_xticks(range(len(places)), places)
    left.set_ylabel("GiB (dashed: available)")
    left.legend(fontsize="x-small")
    tried = found.decision.tried
    right.plot([one.choice.batch_size for one in tried], [one.timing.tokens_per_second for one in tried], marker="o")
    right.axvline(found.plan.batch_size, color="black", linestyle="dashed")
    right.set_xscale("log", base=2)
    right.set_xlabel("rows a GPU (dashed: the plan)")
    right.set_ylabel("tokens/s" + (" (projected)" if found.speeds.projected else ""))
    figure.suptitle(f"{question.anatomy.architecture}, offload {found.plan.offload}")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
