"""All that a recorder has seen since it was last asked, as one thing, and all that passes do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from zeroinf.planner.allocator import Event, Events
from zeroinf.planner.workload import Kernels, Pass, lock_step
from zeroinf.simulation.recorder import Recorder


@dataclass(frozen=True, slots=True)
class Recorded:
    """What happened, whatever the block it happened in, and the kernels by block."""

    events: Events
    kernels: tuple[Kernels, ...]


def cut(recorder: Recorder, times: Sequence[float] = ()) -> Recorded:
    """Take what `recorder` has; block i stands for `times[i]` blocks."""
    return Recorded(sum(recorder.cut(), ()), recorder.cut_kernels(times))


def repeated(passes: Sequence[Pass]) -> list[Event]:
    """The events of `passes`, in order; what stays alive after them ends, as rows do."""
    events = [event for steps in passes for event in lock_step(steps)]
    alive: dict[int, None] = {}
    for key, nbytes in events:
        if nbytes is None:
            del alive[key]
        else:
            alive[key] = None
    return events + [Event(key) for key in alive]
