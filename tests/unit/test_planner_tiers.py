"""Which blocks stay on the GPU, which rest in host memory, which on NVMe."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zeroinf.planner.tiers import Tier, tiers, unit_tiers


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[int], int, int]:
    """Sizes of blocks, of few kinds, and how many stay and how many rest on NVMe."""
    sizes = draw(st.lists(st.sampled_from([1, 7, 30][: draw(st.integers(1, 3))]), min_size=1, max_size=130))
    resident = draw(st.integers(0, len(sizes)))
    return sizes, resident, draw(st.integers(0, len(sizes) - resident))


def is_even(places: list[int], length: int) -> bool:
    """Whether distances from each place to the next, on over the end of the pass, differ by one at most."""
    gaps = [b - a for a, b in zip(places, [*places[1:], places[0] + length], strict=True)] if places else [0]
    return max(gaps) - min(gaps) <= 1


@given(cases())
def test_the_largest_stay_the_smallest_rest_on_nvme_and_those_alike_are_spread_evenly(
    case: tuple[list[int], int, int],
) -> None:
    sizes, resident, nvme = case
    found = tiers(sizes, resident, nvme)
    by_tier = {tier: sorted(size for size, own in zip(sizes, found, strict=True) if own == tier) for tier in set(found)}
    expected = sorted(sizes)
    assert by_tier.get("nvme", []) == expected[:nvme]
    assert by_tier.get("gpu", []) == expected[len(sizes) - resident :]
    assert len(found) == len(sizes)
    for size in set(sizes):
        alike = [tier for tier, own in zip(found, sizes, strict=True) if own == size]
        assert is_even([at for at, tier in enumerate(alike) if tier == "gpu"], len(alike))
        streaming = [tier for tier in alike if tier != "gpu"]
        assert is_even([at for at, tier in enumerate(streaming) if tier == "nvme"], len(streaming))


def test_residents_lie_in_the_middle_of_their_shares() -> None:
    assert tiers((1,) * 8, 2, 2) == ("host", "nvme", "gpu", "host", "host", "nvme", "gpu", "host")


@pytest.mark.parametrize(("resident", "nvme"), [(-1, 0), (0, -1), (3, 2), (5, 0)])
def test_counts_that_cannot_be_are_refused(resident: int, nvme: int) -> None:
    with pytest.raises(ValueError, match="of 4"):
        tiers((1,) * 4, resident, nvme)


def test_blocks_of_an_encoder_are_the_last_to_stay_and_the_first_on_the_disk() -> None:
    assert tiers((1,) * 6, 1, 1, encoder=2) == ("host", "nvme", "host", "host", "gpu", "host")
    assert tiers((1,) * 6, 5, 0, encoder=2) == ("host", "gpu", "gpu", "gpu", "gpu", "gpu")
    assert tiers((1,) * 6, 0, 4, encoder=2) == ("nvme", "nvme", "host", "nvme", "host", "nvme")


def test_what_is_beside_experts_leaves_the_disk_first() -> None:
    blocks: tuple[Tier, ...] = ("nvme", "gpu", "nvme")
    assert unit_tiers(blocks, (3, 3, 1), 0) == (("nvme",) * 3, ("gpu",) * 3, ("nvme",))
    assert unit_tiers(blocks, (3, 3, 1), 2) == (("host", "nvme", "nvme"), ("gpu",) * 3, ("host",))
    assert unit_tiers(blocks, (5, 3, 1), 4) == (("host", "nvme", "host", "nvme", "host"), ("gpu",) * 3, ("host",))


def test_more_parts_in_host_memory_than_there_are_on_nvme_are_refused() -> None:
    with pytest.raises(ValueError, match="of 3"):
        unit_tiers(("nvme", "host"), (3, 3), 4)
