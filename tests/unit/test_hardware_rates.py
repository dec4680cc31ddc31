"""Rates as data: what is known, where it comes from, and what happens when newer figures come in."""

from __future__ import annotations

from pathlib import Path

import pytest

from zeroinf.hardware.machine import Disk
from zeroinf.hardware.rates import Rates

DISK = Disk(
    path=Path("/nvme/weights"),
    exists=True,
    writable=True,
    free_bytes=1 << 40,
    total_bytes=1 << 40,
    filesystem="xfs",
    o_direct=True,
    mount=Path("/nvme"),
    device="/dev/nvme0n1",
)


def test_nothing_is_known_until_it_is_said() -> None:
    assert Rates().known == {}
    assert Rates().of_disk(DISK) is None
    assert Rates.of("measured", link_gbps=None).known == {}


def test_every_rate_has_an_origin() -> None:
    rates = Rates(link_gbps=25.0, hbm_gbps=900.0, origins={"hbm_gbps": "data sheet"})
    assert [rates.origin(name) for name in rates.known] == ["given", "data sheet"]


def test_an_origin_without_its_rate_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="link_gbps"):
        Rates(origins={"link_gbps": "measured"})


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("inf"), float("nan")])
def test_a_rate_that_cannot_be_is_refused_by_name(wrong: float) -> None:
    with pytest.raises(ValueError, match="link_gbps"):
        Rates(link_gbps=wrong)
    with pytest.raises(ValueError, match="matmul_tflops"):
        Rates(matmul_tflops={"bfloat16": {1: 5.0, 8: wrong}})
    assert Rates(nccl_bytes={2: 0}).nccl_bytes == {2: 0}


def test_newer_rates_replace_older_ones_with_their_origins_and_leave_the_rest() -> None:
    older = Rates.of("data sheet", link_gbps=31.5, hbm_gbps=900.0)
    newer = older.updated(Rates.of("measured", link_gbps=24.0))
    assert newer.known == {"link_gbps": 24.0, "hbm_gbps": 900.0}
    assert (newer.origin("link_gbps"), newer.origin("hbm_gbps")) == ("measured", "data sheet")
    assert older.updated(Rates(link_gbps=20.0)).origin("link_gbps") == "given"


def test_measuring_one_disk_keeps_what_is_known_of_another() -> None:
    first = Rates.of("measured", disk_gbps={"/a": 2.0, "/b": 3.0}, disk_gbps_by_requests={"/a": {1: 1.0, 4: 2.0}})
    both = first.updated(Rates.of("measured", disk_gbps={"/b": 4.0}, disk_gbps_by_requests={"/b": {1: 4.0}}))
    assert both.disk_gbps == {"/a": 2.0, "/b": 4.0}
    assert both.disk_gbps_by_requests == {"/a": {1: 1.0, 4: 2.0}, "/b": {1: 4.0}}


def test_a_rate_can_be_forgotten_with_its_origin() -> None:
    assert Rates.of("measured", link_gbps=25.0, hbm_gbps=900.0).without("link_gbps") == Rates.of(
        "measured", hbm_gbps=900.0
    )


def test_a_folder_has_the_rate_of_its_file_system() -> None:
    assert Rates(disk_gbps={"/nvme": 5.6}).of_disk(DISK) == 5.6
