"""Defines how plots and pages look: one colour a kind of memory and an engine everywhere, in light and in dark.

The colours are those of Okabe and Ito, which people with any kind of colour blindness tell apart, with lighter ones of
the same hues on dark ground. Lines differ in markers and dashes as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from zeroinf.planner.memory import Term

Kind = Literal["weights", "layer buffers", "KV cache", "activations", "system"]
"""What memory is taken for: weights that stay, layers on their way, keys and values, what a forward computes, and what
libraries, allocators and the system take."""

KINDS: tuple[Kind, ...] = ("weights", "layer buffers", "KV cache", "activations", "system")

_BUFFERS = ("slot", "ring", "staging", "on their way", "while loading", "expanded", "live weights", "made of its codes")
_ACTIVATIONS = ("activations", "scores", "encoder's states")


@dataclass(frozen=True, slots=True)
class Theme:
    """Colours of one ground."""

    ground: str
    text: str
    faint: str
    """Of axes, grids and what is of less weight."""
    empty: str
    """Of memory that stays free."""
    kinds: tuple[str, ...]
    """Of `KINDS`, in their order."""
    lines: tuple[str, ...]

    def of(self, kind: Kind) -> str:
        """The colour of a kind."""
        return self.kinds[KINDS.index(kind)]

    def upon(self, kind: Kind) -> str:
        """The colour of text upon that of a kind: the one of ground and text that it contrasts with more."""
        return max((self.ground, self.text), key=lambda one: _contrast(one, self.of(kind)))


LIGHT = Theme(
    ground="#ffffff",
    text="#1d2433",
    faint="#586174",
    empty="#eceff4",
    kinds=("#0072b2", "#56b4e9", "#e69f00", "#009e73", "#8a909c"),
    lines=("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#586174"),
)
DARK = Theme(
    ground="#10141c",
    text="#e8ebf2",
    faint="#a9b2c5",
    empty="#262d3b",
    kinds=("#3d9fe0", "#9ad4f7", "#f2b33d", "#35c497", "#7f8796"),
    lines=("#56b4e9", "#f0833f", "#35c497", "#e3a0c5", "#e0c04c", "#a9b2c5"),
)
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES: tuple[Any, ...] = ("solid", "dashed", "dashdot", "dotted", (0, (6, 1, 1, 1, 1, 1)), (0, (3, 1)))


def _contrast(one: str, other: str) -> float:
    """The contrast ratio of two colours, as the Web Content Accessibility Guidelines define it."""
    lighter, darker = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def _luminance(colour: str) -> float:
    parts = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    linear = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def kind_of(term: str) -> Kind:
    """The kind of a memory term, by its name."""
    if term.startswith("KV cache"):
        return "KV cache"
    if any(word in term for word in _BUFFERS):
        return "layer buffers"
    if any(word in term for word in _ACTIVATIONS):
        return "activations"
    named = ("weights", "embeddings", "layers", "read pool", "store")
    return "weights" if any(word in term for word in named) and "gaps" not in term else "system"


def by_kind(terms: Sequence[Term], place: str) -> dict[Kind, int]:
    """Bytes of one place by kind, in the order of `KINDS`, those that take some."""
    sizes = {
        kind: sum(term.nbytes for term in terms if term.place == place and kind_of(term.name) == kind) for kind in KINDS
    }
    return {kind: size for kind, size in sizes.items() if size}


def plain(value: float, _: int = 0) -> str:
    """A tick as people write it: 1,000 and 0.25, no powers of ten."""
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:,.3g}"


def styled_figure(theme: Theme, size: tuple[float, float], title: str, subtitle: str) -> Any:
    """matplotlib's figure of that size in inches, with a title and below it a line of smaller text."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, facecolor=theme.ground, layout="constrained")
    layout: Any = figure.get_layout_engine()
    layout.set(rect=(0.01, 0.01, 0.98, 1 - 0.95 / size[1]), wspace=0.06)
    figure.suptitle(
        title, x=0.02, y=1 - 0.18 / size[1], ha="left", va="top", fontsize=15, weight="bold", color=theme.text
    )
    figure.text(0.02, 1 - 0.52 / size[1], subtitle, ha="left", va="top", fontsize=10.5, color=theme.faint)
    return figure


def style_axis(axis: Any, theme: Theme, *, grid: Literal["x", "y", "both"] = "both") -> None:
    """Plain axes: no frame, a faint grid, and text in the theme's colours."""
    axis.set_facecolor(theme.ground)
    for side in axis.spines.values():
        side.set_visible(False)
    axis.tick_params(colors=theme.faint, length=0, labelsize=10)
    axis.xaxis.label.set_color(theme.faint)
    axis.yaxis.label.set_color(theme.faint)
    axis.grid(True, axis=grid, color=theme.empty, linewidth=1)
    axis.set_axisbelow(True)
