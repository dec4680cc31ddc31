"""Measured rates on disk: found again on the same hardware, and on no other."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from zeroinf.errors import EnvironmentProblem
from zeroinf.hardware.checks import check_profile
from zeroinf.hardware.machine import Disk, Gpu, Machine, Memory
from zeroinf.hardware.profile import Profile, find_profile, keep_profile, read_profile
from zeroinf.hardware.rates import Rates

GIB = 1 << 30
NOW = datetime(2030, 5, 6, 7, 8, tzinfo=UTC)
GPUS = tuple(
    Gpu(
        index=index, name="Fake 24", total_bytes=24 * GIB, free_bytes=24 * GIB, other_bytes=0, pcie_generation=4,
        pcie_width=16, capability=(8, 9), uuid=f"GPU-{index}",
    )
    for index in range(4)
)  # fmt: skip
FAST, SLOW = (
    Disk(
        path=Path(f"/{name}/weights"), exists=True, writable=True, free_bytes=900 * GIB, total_bytes=1000 * GIB,
        filesystem="xfs", o_direct=True, mount=Path(f"/{name}"), device=f"/dev/{name}",
    )
    for name in ("fast", "slow")
)  # fmt: skip
MACHINE = Machine(
    gpus=GPUS,
    memory=Memory(
        total_bytes=256 * GIB, available_bytes=200 * GIB, cgroup_limit_bytes=None, swap_bytes=0,
        shared_memory_bytes=8 * GIB, memlock_bytes=None, numa_nodes=2,
    ),
    disks=(FAST,),
    cores=32,
    versions={"python": "3.11", "torch": "2.13.0"},
    hostname="box",
    driver="570.1",
)  # fmt: skip
RATES = Rates.of(
    "measured",
    link_gbps=25.0,
    links_gbps={1: 25.0, 2: 50.0, 4: 90.0},
    matmul_tflops={"bfloat16": {1: 1.0, 8192: 300.0}},
    context_bytes=500 << 20,
    disk_gbps={"/fast": 5.6},
    disk_gbps_by_requests={"/fast": {1: 1.5, 8: 5.6}},
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ZEROINF_CACHE", str(tmp_path))
    return tmp_path


def change_file(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def test_what_was_measured_is_read_again_with_its_time() -> None:
    path = keep_profile(MACHINE, RATES, now=NOW)
    assert read_profile(MACHINE) == RATES
    assert find_profile(MACHINE) == Profile(path=path, rates=RATES, measured_at=NOW)


def test_machine_that_was_never_measured_has_no_rates_and_no_trouble() -> None:
    found = find_profile(MACHINE)
    assert (found.rates, found.measured_at, found.trouble) == (Rates(), None, None)


def test_each_host_that_shares_the_cache_has_rates_of_its_own() -> None:
    other = replace(MACHINE, hostname="other")
    keep_profile(MACHINE, RATES, now=NOW)
    assert read_profile(other) == Rates()
    keep_profile(other, Rates.of("measured", link_gbps=11.0), now=NOW)
    assert read_profile(MACHINE) == RATES


@pytest.mark.parametrize(
    ("changes", "trouble"),
    [
        ({"driver": "580.2"}, "driver 570.1, now it is 580.2"),
        ({"driver": None}, "driver 570.1, now it is None"),
        ({"versions": {"torch": "2.14.0"}}, "torch 2.13.0, now it is 2.14.0"),
        ({"gpus": (replace(GPUS[0], uuid="GPU-new"),)}, "other hardware: Fake 24"),
        ({"gpus": (*GPUS, replace(GPUS[0], name="Fake 48", uuid="GPU-9"))}, "other hardware: Fake 48"),
    ],
)
def test_rates_of_other_hardware_or_software_are_not_used_and_the_difference_is_told(
    changes: dict[str, Any], trouble: str
) -> None:
    keep_profile(MACHINE, RATES, now=NOW)
    found = find_profile(replace(MACHINE, **changes))
    assert found.rates == Rates()
    assert found.trouble is not None
    assert trouble in found.trouble


def test_rates_of_all_gpus_hold_for_some_of_them() -> None:
    keep_profile(MACHINE, RATES, now=NOW)
    assert read_profile(replace(MACHINE, gpus=GPUS[1:3])) == RATES


def test_rates_of_a_disk_are_used_for_that_disk_only() -> None:
    keep_profile(MACHINE, RATES, now=NOW)
    unnamed = read_profile(replace(MACHINE, disks=()))
    assert unnamed == RATES.without("disk_gbps", "disk_gbps_by_requests")
    exchanged = replace(FAST, device="/dev/another")
    assert read_profile(replace(MACHINE, disks=(exchanged, SLOW))) == unnamed
    elsewhere = replace(FAST, path=Path("/fast/other/folder"))
    assert read_profile(replace(MACHINE, disks=(elsewhere,))).of_disk(elsewhere) == 5.6


def test_measuring_again_updates_what_was_measured_and_keeps_the_rest() -> None:
    keep_profile(MACHINE, RATES, now=NOW)
    one_gpu = replace(MACHINE, gpus=GPUS[:1], disks=(SLOW,))
    newer = Rates.of("measured", link_gbps=24.0, links_gbps={1: 24.0}, disk_gbps={"/slow": 0.5})
    keep_profile(one_gpu, newer, now=NOW + timedelta(days=1))
    found = find_profile(replace(MACHINE, disks=(FAST, SLOW)))
    assert found.measured_at == NOW + timedelta(days=1)
    assert found.rates.link_gbps == 24.0
    assert found.rates.links_gbps == {1: 24.0, 2: 50.0, 4: 90.0}
    assert found.rates.disk_gbps == {"/fast": 5.6, "/slow": 0.5}
    assert found.rates.context_bytes == 500 << 20


def test_measuring_other_hardware_forgets_the_old() -> None:
    keep_profile(MACHINE, RATES, now=NOW)
    upgraded = replace(MACHINE, driver="580.2")
    keep_profile(upgraded, Rates.of("measured", link_gbps=26.0), now=NOW)
    assert read_profile(upgraded) == Rates.of("measured", link_gbps=26.0)


@pytest.mark.parametrize(
    ("changes", "trouble"),
    [
        ({"schema": 2}, "schema: Input should be 1"),
        ({"gpus": "all"}, "gpus: "),
        ({"rates": {"link_gbps": -1}}, "link_gbps cannot be -1"),
        ({"rates": {"speed": 1}}, "rates.speed: unknown key"),
        ({"measured_at": "yesterday"}, "measured_at: "),
    ],
)
def test_broken_profile_is_a_trouble_and_never_a_crash(changes: dict[str, Any], trouble: str) -> None:
    path = keep_profile(MACHINE, RATES, now=NOW)
    change_file(path, **changes)
    found = find_profile(MACHINE)
    assert found.rates == Rates()
    assert found.trouble is not None
    assert trouble in found.trouble
    keep_profile(MACHINE, RATES, now=NOW)
    assert read_profile(MACHINE) == RATES, "measuring again mends it"


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]"])
def test_file_that_is_no_profile_at_all_is_a_trouble(content: bytes) -> None:
    keep_profile(MACHINE, RATES, now=NOW).write_bytes(content)
    found = find_profile(MACHINE)
    assert found.trouble is not None
    assert read_profile(MACHINE) == Rates()


def test_profile_that_cannot_be_read_is_a_trouble() -> None:
    path = keep_profile(MACHINE, RATES, now=NOW)
    path.unlink()
    path.mkdir()
    assert find_profile(MACHINE).trouble == "cannot be read: Is a directory"


def test_failed_write_leaves_the_old_profile_and_no_litter(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = keep_profile(MACHINE, RATES, now=NOW)

    def no_room(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", no_room)
    with pytest.raises(EnvironmentProblem, match="No space left on device"):
        keep_profile(MACHINE, Rates.of("measured", link_gbps=1.0), now=NOW)
    assert read_profile(MACHINE) == RATES
    assert list(cache.rglob("*")) == [path.parent, path]


@pytest.mark.parametrize(
    ("age", "words"),
    [
        (timedelta(0), "measured today (2030-05-06 07:08 UTC)"),
        (timedelta(days=1, hours=2), "measured yesterday (2030-05-06 07:08 UTC)"),
        (timedelta(days=30), "measured 30 days ago (2030-05-06 07:08 UTC)"),
    ],
)
def test_doctor_says_how_old_the_rates_are(age: timedelta, words: str) -> None:
    rates = RATES.updated(Rates.of("measured", host_copy_gbps=12.0))  # which a run alone does not measure
    check = check_profile(Profile(path=Path("p"), rates=rates, measured_at=NOW), NOW + age)
    assert (check.status, check.value) == ("ok", words)


def test_doctor_warns_of_rates_that_are_missing_or_not_used() -> None:
    missing = check_profile(Profile(path=Path("p")), NOW)
    broken = check_profile(Profile(path=Path("p.json"), trouble="is broken"), NOW)
    assert (missing.status, broken.status) == ("warn", "warn")
    assert "p.json is broken" in broken.value
    assert all("--measure" in (check.advice or "") for check in (missing, broken))
