"""Workloads that were read off a line are those that a simulation gives, and where there is no line, none is drawn."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fake_machines import shape_of, workload_of
from small_models import small_config

from zeroinf.model.inspect import read_anatomy
from zeroinf.planner.allocator import Event
from zeroinf.planner.workload import Lengths, Pass, Pattern, Step, same
from zeroinf.simulation.rows import ByRows
from zeroinf.simulation.workload import Simulator, _parts


def step_of(rows: int) -> Step:
    return workload_of(shape_of(rows)).last_decode[0]


class Counted:
    """A simulation that remembers what it was asked for; from `bend` rows on, more bytes than the line says."""

    def __init__(self, bend: int | None = None) -> None:
        self.asked: list[int] = []
        self._bend = bend

    def __call__(self, rows: int) -> Pass:
        self.asked.append(rows)
        found = step_of(rows)
        if self._bend is not None and rows >= self._bend:
            found = replace(found, inputs=(Event(1, (found.inputs[0].nbytes or 0) + rows**2),))
        return step_of(rows), found


def alike(some: Pass, rows: int) -> bool:
    return len(some) == 2 and all(same(step, step_of(rows)) for step in some)


def test_a_few_numbers_of_rows_stand_for_all() -> None:
    simulate = Counted()
    by_rows = ByRows(simulate)
    for rows in (1, 2, 4, 8, 16, 32, 64, 48, 3, 512):
        assert alike(by_rows(rows), rows)
    assert simulate.asked == [1, 2, 4, 512]
    assert alike(by_rows(5000), 5000)  # so far out it is looked at again
    assert alike(by_rows(4500), 4500)
    assert simulate.asked == [1, 2, 4, 512, 5000]


def test_a_line_is_drawn_whichever_rows_come_first() -> None:
    simulate = Counted()
    by_rows = ByRows(simulate)
    for rows in (900, 3, 16, 100, 5000, 2):
        assert alike(by_rows(rows), rows)
    assert simulate.asked == [900, 3, 16]


def test_a_line_ends_where_it_was_said_to_end() -> None:
    simulate = Counted(31)
    by_rows = ByRows(simulate, most=30)
    for rows in (2, 4, 8, 16, 30):
        assert alike(by_rows(rows), rows)
    assert simulate.asked == [2, 4, 30]


def test_few_numbers_of_rows_are_simulated_as_they_come() -> None:
    simulate = Counted()
    by_rows = ByRows(simulate)
    assert alike(by_rows(4), 4)
    assert alike(by_rows(2), 2)
    assert simulate.asked == [4, 2]


def test_tensors_that_happen_to_be_equally_large_bend_no_line() -> None:
    def simulate(rows: int) -> Pass:
        asked.append(rows)
        found = step_of(rows)
        groups = [replace(group, kernels=(group.kernels[0]._replace(pattern=seen(rows)),)) for group in found.kernels]
        return (replace(found, kernels=tuple(groups)),)

    def seen(rows: int) -> Pattern:
        return "straight" if rows == 512 else "crossed"

    asked = list[int]()
    by_rows = ByRows(simulate)
    for rows in (2, 4, 8, 16, 32, 64):
        by_rows(rows)
    assert asked == [2, 4, 512]


@pytest.mark.parametrize("bend", [2, 8, 100])
def test_where_there_is_no_line_every_number_is_simulated(bend: int) -> None:
    simulate = Counted(bend)
    by_rows = ByRows(simulate)
    for rows in (2, 4, 8, 128, 130, 200):
        by_rows(rows)
        if rows >= bend:
            assert simulate.asked[-1] == rows
    assert by_rows(200) is by_rows(200)


@pytest.mark.parametrize("name", ["llama", "bloom", "mixtral", "gemma2"])
@pytest.mark.parametrize(("start", "count"), [(0, 32), (40, 1), (16, 16)])
def test_real_models_lie_on_the_line(name: str, start: int, count: int) -> None:
    config = small_config(name)
    lengths = Lengths(prompt_tokens=32, new_tokens=16)
    simulate = Simulator(config, read_anatomy(config, dtype="bfloat16"), lengths)
    for rows in (2, 4, 8):
        simulate._step(rows, start, count)
    for rows in (3, 61):
        assert same(simulate._step(rows, start, count), simulate._simulate(_parts(rows, start, count, True), None))
