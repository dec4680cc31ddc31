"""Which blocks stay on the GPU, which rest in host memory, which on NVMe."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zeroinf.planner.tiers import Tier, tiers, unit_tiers


@st.composite
def counts(draw: st.DrawFn) -> tuple[int, int, int]:
    blocks = draw(st.integers(1, 130))
    resident = draw(st.integers(0, blocks))
    return blocks, resident, draw(st.integers(0, blocks - resident))


def gaps(places: list[int], length: int) -> list[int]:
    """Distances from each place to the next, on over the end of the pass."""
    return [b - a for a, b in zip(places, [*places[1:], places[0] + length], strict=True)]


@given(counts())
def test_every_tier_gets_its_count_and_is_spread_evenly(case: tuple[int, int, int]) -> None:
    blocks, resident, nvme = case
    found = tiers(blocks, resident, nvme)
    assert len(found) == blocks
    assert (found.count("gpu"), found.count("nvme")) == (resident, nvme)
    places = [i for i, tier in enumerate(found) if tier == "gpu"]
    assert not places or max(gaps(places, blocks)) - min(gaps(places, blocks)) <= 1
    streaming = [tier for tier in found if tier != "gpu"]
    places = [i for i, tier in enumerate(streaming) if tier == "nvme"]
    assert not places or max(gaps(places, len(streaming))) - min(gaps(places, len(streaming))) <= 1


def test_residents_lie_in_the_middle_of_their_shares() -> None:
    assert tiers(8, 2, 2) == ("host", "nvme", "gpu", "host", "host", "nvme", "gpu", "host")


@pytest.mark.parametrize(("resident", "nvme"), [(-1, 0), (0, -1), (3, 2), (5, 0)])
def test_counts_that_cannot_be_are_refused(resident: int, nvme: int) -> None:
    with pytest.raises(ValueError, match="of 4"):
        tiers(4, resident, nvme)


def test_blocks_of_an_encoder_are_the_last_to_stay_and_the_first_on_the_disk() -> None:
    assert tiers(6, 1, 1, encoder=2) == ("host", "nvme", "host", "host", "gpu", "host")
    assert tiers(6, 5, 0, encoder=2) == ("host", "gpu", "gpu", "gpu", "gpu", "gpu")
    assert tiers(6, 0, 4, encoder=2) == ("nvme", "nvme", "host", "nvme", "host", "nvme")


def test_what_is_beside_experts_leaves_the_disk_first() -> None:
    blocks: tuple[Tier, ...] = ("nvme", "gpu", "nvme")
    assert unit_tiers(blocks, (3, 3, 1), 0) == (("nvme",) * 3, ("gpu",) * 3, ("nvme",))
    assert unit_tiers(blocks, (3, 3, 1), 2) == (("host", "nvme", "nvme"), ("gpu",) * 3, ("host",))
    assert unit_tiers(blocks, (5, 3, 1), 4) == (("host", "nvme", "host", "nvme", "host"), ("gpu",) * 3, ("host",))
