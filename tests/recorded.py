"""All that a recorder has seen since it was last asked, as one thing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from zeroinf.planner.workload import Events, Kernels
from zeroinf.simulation.recorder import Recorder


@dataclass(frozen=True, slots=True)
class Recorded:
    """What happened, whatever the block it happened in, and the kernels by block."""

    events: Events
    kernels: tuple[Kernels, ...]


def cut(recorder: Recorder, times: Sequence[float] = ()) -> Recorded:
    """Take what `recorder` has; block i stands for `times[i]` blocks."""
    return Recorded(sum(recorder.cut(), ()), recorder.cut_kernels(times))
