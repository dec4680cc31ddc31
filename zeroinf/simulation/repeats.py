"""Repeats recorded layers on paper, and gives layers that do the same one and the same section of events.

Input: a step that was recorded with few layers. Output: the step of more layers, in which equal sections are one
object, so that whoever replays or interpolates a step handles each of them once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from heapq import heappop, heappush
from itertools import chain

from zeroinf.planner.allocator import Crossing, Event, Events
from zeroinf.planner.workload import Kernel, Kernels, Step


def with_repeats(step: Step, starts: Sequence[int], times: int) -> Step | None:
    """`step` with the layers between its first and its last one `times` times more; layer i begins with section
    `starts[i]`.

    None where that cannot be told: each layer must hand the next one the same things, and keep nothing else.
    """
    if not times or len(starts) < 3:
        return None if times else step
    before, first, middle, last = (
        step.sections[: starts[0]],
        step.sections[starts[0] : starts[1]],
        step.sections[starts[1] : starts[-1]],
        step.sections[starts[-1] :],
    )
    handed, handing = (_lasting(sections) for sections in (first, middle))
    through = _joined(middle)
    ended = set(through.ending)
    if ended != set(handed) or list(handed.values()) != list(handing.values()) or ended & set(_lasting(before)):
        return None
    unit = 1 + max((key for key, _ in chain(step.inputs, *step.sections, step.end, step.choice)), default=0)
    names = dict(zip(handed, handing, strict=True))
    sections = [*before, *first, *middle]
    for number in range(1, times + 1):
        # What the layers before handed on has their names.
        given = {key: names[key] + (number - 1) * unit for key in handed}
        sections += [_renamed(section, given, number * unit) for section in middle]
    given = {key: key + times * unit for key in handing}
    rest = [_renamed(section, given, 0) for section in (*last, step.end, step.choice)]
    return replace(step, sections=(*sections, *rest[:-2]), end=rest[-2], choice=rest[-1])


def told_alike(step: Step) -> Step:
    """`step` with keys that are used again after their end, so that layers that do the same have equal sections, each
    of which is one object; and with kernels of such layers once. It must end what it begins, and nothing else."""
    free: list[int] = []
    names: dict[int, int] = {}
    known: dict[Events, Events] = {}

    def alike(events: Events) -> Events:
        found = []
        for key, nbytes in events:
            if nbytes is None:
                name = names.pop(key)
                heappush(free, name)
            else:
                name = names[key] = heappop(free) if free else len(names)
            found.append(Event(name, nbytes))
        own = tuple(found)
        return known.setdefault(own, own)

    times: dict[tuple[Kernel, ...], float] = {}
    for group in step.kernels:
        times[group.kernels] = times.get(group.kernels, 0.0) + group.times
    return replace(
        step,
        inputs=alike(step.inputs),
        sections=tuple(map(alike, step.sections)),
        end=alike(step.end),
        choice=alike(step.choice),
        kernels=tuple(Kernels(count, kernels) for kernels, count in times.items()),
    )


def _joined(sections: Iterable[Events]) -> Crossing:
    return Crossing.of(tuple(chain.from_iterable(sections)))


def _lasting(sections: Sequence[Events]) -> dict[int, int | None]:
    """The sizes of what begins in `sections` and is there after, by key."""
    lasting = set(_joined(sections).lasting)
    return {key: nbytes for key, nbytes in chain.from_iterable(sections) if key in lasting and nbytes is not None}


def _renamed(events: Events, given: dict[int, int], more: int) -> Events:
    return tuple(Event(given[key] if key in given else key + more, nbytes) for key, nbytes in events)
