"""Draws a plan as a PNG: memory by what it is taken for, and tokens/s against the batch size."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from zeroinf.bench.plot_style import DARK, KINDS, LIGHT, Theme, by_kind, plain, style_axis, styled_figure
from zeroinf.cli.plan_titles import subtitle_of, title_of
from zeroinf.errors import EnvironmentProblem, OutputError
from zeroinf.planner.memory import MemoryPlace, total
from zeroinf.planner.summary import limited_by
from zeroinf.simulation.make_plan import PlanInput, PlanResult
from zeroinf.sizes import gib

PLACES: dict[MemoryPlace, str] = {"gpu": "GPU", "host": "host", "disk": "disk"}
# Parts of a bar that are narrower than this share have no room for a label of their own.
_LABELLED = 0.14


def draw_plan(model: str, plan_input: PlanInput, found: PlanResult, path: Path, *, dark: bool = False) -> None:
    """Write a PNG to `path`. Raises EnvironmentProblem without matplotlib, OutputError where it cannot be written."""
    if find_spec("matplotlib") is None:
        raise EnvironmentProblem("--plot needs matplotlib", hint="pip install 'zeroinf[plot]'")
    figure = plan_drawing(model, plan_input, found, DARK if dark else LIGHT)
    try:
        figure.savefig(path, format="png", dpi=120)
    except OSError as error:
        raise OutputError(f"--plot {path}: {error.strerror}", hint="choose another name") from error


def plan_drawing(model: str, plan_input: PlanInput, found: PlanResult, theme: Theme = LIGHT) -> Any:
    """matplotlib's figure: a bar of memory for each place on the left, tokens/s against the batch on the right."""
    figure = styled_figure(theme, (11.5, 4.8), title_of(model, plan_input), subtitle_of(plan_input, found.plan))
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    _draw_memory(left, found, theme)
    _draw_speed(right, found, theme)
    return figure


def _draw_memory(axis: Any, found: PlanResult, theme: Theme) -> None:
    places = [place for place in PLACES if total(found.plan.terms, place)]
    seen = set[str]()
    for row, place in enumerate(places):
        available, start = found.decision.budgets[place], 0.0
        axis.barh(row, 100, height=0.5, color=theme.empty)
        for kind, size in by_kind(found.plan.terms, place).items():
            share = 100 * size / available
            label = kind if kind not in seen else "_"
            axis.barh(
                row, share, left=start, height=0.5, color=theme.of(kind), label=label,
                edgecolor=theme.ground, linewidth=1,
            )  # fmt: skip
            if share >= 100 * _LABELLED:
                text = f"{kind}\n{gib(size)}"
                axis.text(start + share / 2, row, text, ha="center", va="center", fontsize=9, color=theme.upon(kind))
            seen.add(kind)
            start += share
        used = total(found.plan.terms, place)
        says = f"{PLACES[place]}: {gib(used)} of {gib(available)}, {100 * used / available:.0f} %"
        axis.text(0, row - 0.34, says, ha="left", va="bottom", fontsize=10.5, color=theme.text)
    style_axis(axis, theme, grid="x")
    axis.set_ylim(len(places) - 0.5, -0.75)
    axis.set_xlim(0, 100)
    axis.set_yticks([])
    axis.set_xlabel("% of what is available")
    handles, labels = axis.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda at: KINDS.index(labels[at]))
    axis.legend(
        [handles[at] for at in order], [labels[at] for at in order], loc="upper center", bbox_to_anchor=(0.5, -0.16),
        ncols=5, frameon=False, fontsize=9.5, labelcolor=theme.text, handlelength=1, columnspacing=1.2,
    )  # fmt: skip


def _draw_speed(axis: Any, found: PlanResult, theme: Theme) -> None:
    best: dict[int, float] = {}
    tried = sorted((*found.decision.tried, found.decision.chosen), key=lambda one: one.choice.batch_size)
    for one in tried:  # the same batch with more or fewer layers on the GPU
        rows = one.choice.batch_size
        best[rows] = max(best.get(rows, 0.0), one.timing.tokens_per_second)
    style_axis(axis, theme)
    axis.plot(
        list(best), list(best.values()), color=theme.lines[0], marker="o", markersize=5, linewidth=1.8, clip_on=False
    )
    rows, rate = found.plan.batch_size, found.decision.tokens_per_second
    axis.plot([rows], [rate], marker="o", markersize=11, color=theme.kinds[2], markeredgecolor=theme.ground)
    axis.set_title(
        f"The plan: {rate:,.{0 if rate >= 100 else 1}f} tokens/s at batch {rows:,};\n"
        f"{limited_by(found.decision.chosen.timing, found.plan.device)}",
        loc="left", fontsize=10.5, color=theme.text,
    )  # fmt: skip
    axis.set_xscale("log", base=2)
    axis.minorticks_off()
    ticks = [2**power for power in range(max(best).bit_length() + 1) if 2**power <= 1.1 * max(best)]
    axis.set_xticks(ticks[:: 2 if len(ticks) > 8 else 1])
    axis.xaxis.set_major_formatter(plain)
    axis.yaxis.set_major_formatter(plain)
    axis.set_ylim(0, 1.12 * max(best.values()))
    axis.set_xlabel("batch: sequences that run at once on each GPU")
    axis.set_ylabel("tokens/s" + (" (estimated)" if found.speeds.projected else ""))
