"""A job that is killed at any event, or whose disk fails at any event, loses nothing that was reported as done.

The default tier takes every fifth event, others each day (TEST_SEED); `scripts/test --all` takes the others as well.
"""

from __future__ import annotations

import os

import pytest
from schedules import SWEEPS, Bench, Share
from tiers import tiered

SHARES = ("every fifth", "the others")


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench()


@pytest.mark.parametrize("share", tiered(SHARES, ("every fifth",)))
@pytest.mark.parametrize("sweep", SWEEPS)
def test_nothing_reported_is_lost_nothing_comes_twice_and_the_output_is_that_of_an_undisturbed_run(
    sweep: str, share: str, bench: Bench
) -> None:
    seed = int(os.environ["TEST_SEED"])
    tally = SWEEPS[sweep](bench, share=Share(seed, nth=5, is_rest=share != "every fifth"))
    assert tally.schedules >= 4
    assert tally.faults >= tally.schedules // 2, "faults that do not happen prove nothing"
    assert tally.is_clean, f"{tally}, TEST_SEED={seed}"
