"""Compares a plan with the run that followed it, term by term."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from zeroinf.planner.memory import (
    COMPUTED,
    ENCODED,
    GAPS,
    GRAPHS,
    KV_STAGING,
    OUTSIDE_TORCH,
    SMALL_PAGES,
    UNFORESEEN,
    taken,
)
from zeroinf.planner.plan import Plan
from zeroinf.service.gpu_memory import GpuUse

Unit = Literal["bytes", "s", "tokens/s"]


@dataclass(frozen=True, slots=True)
class Compared:
    """One figure as it was predicted and as it was measured."""

    name: str
    unit: Unit
    predicted: float
    measured: float

    @property
    def ratio(self) -> float:
        """Predicted over measured; 0 where nothing was measured."""
        return self.predicted / self.measured if self.measured else 0.0


def compare_gpu(plan: Plan, uses: Sequence[GpuUse]) -> Iterator[Compared]:
    """GPU memory, of the rank that took most of each."""
    if not uses or not plan.terms:
        return

    def planned(*names: str) -> int:
        return sum(term.nbytes for term in plan.terms if term.place == "gpu" and term.name in names)

    outside, slots, cache = planned(*OUTSIDE_TORCH), planned("slots", "expanded slot"), planned("KV cache", KV_STAGING)
    computing = planned(COMPUTED, ENCODED, GRAPHS, "matrix product workspaces", "live weights")
    gaps, unforeseen = planned(GAPS, SMALL_PAGES, "gaps between live weights"), planned(UNFORESEEN)
    whole = sum(term.nbytes for term in plan.terms if term.place == "gpu")
    allocated = whole - outside - gaps - unforeseen
    yield _bytes("weights that stay", allocated - slots - cache - computing, max(u.loaded - u.slots for u in uses))
    yield _bytes("slots", slots, max(u.slots for u in uses))
    yield _bytes("KV cache", cache, max(u.cache for u in uses))
    gathered = "live weights, " if planned("live weights") else ""  # they come when a model runs, not when it is loaded
    yield _bytes(f"{gathered}activations, workspaces", computing, max(u.allocated - u.loaded - u.cache for u in uses))
    yield _bytes("allocated", allocated, max(u.allocated for u in uses))
    yield _bytes("reserved", allocated + gaps, max(u.reserved for u in uses))
    processes = [(u.process, u.reserved) for u in uses if u.process is not None]
    if processes:
        yield _bytes("CUDA context, collectives", outside, max((process - reserved for process, reserved in processes)))
        yield _bytes("GPU memory in all", whole, max((process for process, _ in processes)))


def compare_host(plan: Plan, locked_bytes: int, peak_bytes: int) -> Iterator[Compared]:
    """Host memory of all ranks together."""
    terms = [term for term in plan.terms if term.place == "host"]
    if not terms:
        return
    locked = sum(term.nbytes for term in terms if "page-locked" in term.name)
    if locked_bytes:
        yield _bytes("host memory, page-locked", locked, locked_bytes)
    yield _bytes("host memory in all", taken(terms, "host"), peak_bytes)


def compare_time(plan: Plan, load_s: float, step_s: float | None, tokens_per_second: float) -> Iterator[Compared]:
    """Time and speed; `step_s` is None where no pass was a token for every row."""
    if plan.timing is not None:
        yield Compared("load", "s", plan.timing.load_s, load_s)
        if step_s is not None:
            yield Compared("step", "s", plan.timing.decode_s, step_s)
        yield Compared("speed", "tokens/s", plan.timing.tokens_per_second, tokens_per_second)


def _bytes(name: str, predicted: int, measured: int) -> Compared:
    return Compared(name, "bytes", predicted, measured)
