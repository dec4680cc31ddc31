"""A job that is killed at any event, or whose disk fails at any event, loses nothing that was reported as done."""

from __future__ import annotations

import pytest
from schedules import SWEEPS, Bench


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench()


@pytest.mark.parametrize("sweep", SWEEPS)
def test_nothing_reported_is_lost_nothing_comes_twice_and_the_output_is_that_of_an_undisturbed_run(
    sweep: str, bench: Bench
) -> None:
    tally = SWEEPS[sweep](bench)
    assert tally.schedules >= 20
    assert tally.faults >= tally.schedules // 2, "faults that do not happen prove nothing"
    assert tally.is_clean, tally
