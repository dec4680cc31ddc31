"""Layers that are repeated on paper are those that would have been recorded, and those that do the same are one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import count

import pytest
from recorded import repeated
from small_models import small_config

from zeroinf.model.inspect import read_anatomy
from zeroinf.planner.allocator import Allocator, Event, Events
from zeroinf.planner.workload import Kernel, Kernels, Lengths, Pass, Shape, Step, in_lock_step, lock_step, same
from zeroinf.simulation.repeats import told_alike, with_repeats
from zeroinf.simulation.workload import Simulator

MIB = 1 << 20


def step_of(kinds: str, *, hands_on: bool = True) -> Step:
    """A step of a layer for each of `kinds`: what it computes depends on the letter, and it hands one thing on."""
    keys = count()
    mask, hidden = next(keys), next(keys)
    sections: list[Events] = [(Event(mask, MIB), Event(hidden, 2 * MIB))]

    def layer(kind: str, hidden: int) -> Iterator[Event]:
        inside = next(keys)
        yield Event(inside, (ord(kind) - ord("a") + 1) * 5 * MIB)
        yield Event(after, 2 * MIB)
        yield Event(inside)
        if hands_on:
            yield Event(hidden)

    given = [hidden]
    for kind in kinds:
        after = next(keys)
        sections.append(tuple(layer(kind, given[-1])))
        given.append(after)
    ends = (Event(mask), *(Event(key) for key in (given[-1:] if hands_on else given)))
    kernels = tuple(Kernels(1.0, (Kernel(ord(kind), 1),)) for kind in kinds)
    return Step(inputs=(), sections=tuple(sections), end=ends, choice=(), kernels=kernels)


def starts_of(kinds: str) -> list[int]:
    return list(range(1, 1 + len(kinds)))


@pytest.mark.parametrize(
    ("kinds", "times", "whole"), [("aaa", 3, "aaaaaa"), ("aaba", 2, "aabababa"), ("caa", 1, "caaa")]
)
def test_repeated_layers_are_those_that_would_have_been_recorded(kinds: str, times: int, whole: str) -> None:
    found = with_repeats(step_of(kinds), starts_of(kinds), times)
    assert found is not None
    expected = told_alike(replace(step_of(whole), kernels=found.kernels))
    assert same(told_alike(found), expected)


def test_layers_that_leave_something_behind_are_not_repeated() -> None:
    assert with_repeats(step_of("aaa", hands_on=False), starts_of("aaa"), 1) is None
    assert with_repeats(step_of("aa"), starts_of("aa"), 1) is None


def test_layers_that_do_the_same_share_sections_and_kernels() -> None:
    step = told_alike(step_of("aabaabaab"))
    assert len(set(map(id, step.sections))) < len(step.sections)
    assert {group.kernels[0].flops: group.times for group in step.kernels} == {ord("a"): 6.0, ord("b"): 3.0}


def test_sections_that_are_replayed_once_leave_what_all_of_their_events_leave() -> None:
    steps: Pass = (told_alike(step_of("aabaabaabaab")), told_alike(step_of("bbbbbbbbbbbb")))
    whole, parts = Allocator(), Allocator()
    for _ in range(2):
        whole.replay(repeated([steps]))
        for number, section in in_lock_step(steps):
            parts.replay_section(section, number)
        parts.end_sections()
    assert parts.usage == whole.usage
    assert parts.live_bytes == whole.live_bytes == 0


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_step_of_few_recorded_layers_takes_what_one_of_all_takes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(name)
    config.num_hidden_layers = 8
    if getattr(config, "layer_types", None):
        config.layer_types = (config.layer_types * 8)[:8]
    anatomy = read_anatomy(config, dtype="bfloat16")

    def usage(simulate: Simulator) -> list[int]:
        allocator = Allocator()
        workload = simulate(Shape(8, 8, 64, forward_tokens=72))
        allocator.replay(repeated(workload.passes))
        sections = workload.passes[0][0].sections
        return [allocator.usage.allocated, len(lock_step(workload.passes[0])), len(sections)]

    lengths = Lengths(prompt_tokens=32, new_tokens=8)
    few = Simulator(config, anatomy, lengths)
    monkeypatch.setattr(Simulator, "_keep_kinds", lambda self, kinds: None)
    every = usage(Simulator(config, anatomy, lengths))
    found = usage(few)
    assert found[0] == every[0]
    assert 7 <= found[2] <= every[2] == 9
