"""Plans for machines whose GPUs are not alike, and for those whose GPU has the host's memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from fake_machines import CHAIN, GIB, machine_of
from simulating import shared_simulations

from zeroinf.cli.main import cli
from zeroinf.errors import DoesNotFitError
from zeroinf.hardware.machine import Machine
from zeroinf.planner.unified import divided

JOB = ("pythia-410m", "--no-advice", "--input-len", "64", "--output-len", "16")


@pytest.fixture(scope="module", autouse=True)
def _models_are_simulated_once() -> Iterator[None]:
    with shared_simulations():
        yield


def plan(machine: Machine, folder: Path, *arguments: str) -> Any:
    file = folder / "machine.json"
    document = {"schema": 1, "machine": asdict(machine), "rates": {}}
    file.write_text(json.dumps(document, default=str))
    return CliRunner().invoke(cli, ["plan", *JOB, "--machine", str(file), *arguments])


def unlike(*free_gib: float) -> Machine:
    """GPUs with so much free memory each."""
    machine = machine_of(gpus=len(free_gib), host_bytes=32 * GIB)
    gpus = zip(machine.gpus, free_gib, strict=True)
    return replace(machine, gpus=tuple(replace(gpu, free_bytes=int(free * GIB)) for gpu, free in gpus))


def test_a_busy_gpu_is_left_out_and_the_plan_says_so(tmp_path: Path) -> None:
    page = plan(unlike(0.5, 8), tmp_path).stdout
    assert "machine  1 x GPU, 8.00 GiB free" in page
    assert "GPUs     1 of 2 (CUDA_VISIBLE_DEVICES=1): with all, as large as the least, nothing would fit" in page


def test_gpus_that_pay_are_taken_and_a_number_that_is_asked_for_is_kept(tmp_path: Path) -> None:
    page = plan(unlike(8, 6), tmp_path).stdout
    assert "1 x GPU, 8.00 GiB free, 1 x GPU, 6.00 GiB free" in page
    assert "CUDA_VISIBLE_DEVICES" not in page
    given = plan(unlike(8, 0.5), tmp_path, "--num-gpus", "2")
    assert isinstance(given.exception, DoesNotFitError), "as it was asked for"


def test_memory_of_a_unified_chip_is_planned_once(tmp_path: Path) -> None:
    pool = 16 * GIB
    alone = machine_of(gpu_bytes=pool, host_bytes=pool)
    machine = replace(alone, gpus=(replace(alone.gpus[0], is_unified=True),))
    result = plan(machine, tmp_path, "--json")
    found = json.loads(result.stdout)["plan"]["memory"]
    assert found["gpu"]["available_bytes"] + found["host"]["available_bytes"] <= pool
    assert found["gpu"]["available_bytes"] > 0.7 * pool
    assert "GiB of host memory of the same pool" in plan(machine, tmp_path).stdout
    assert divided(alone, CHAIN) == alone, "other machines stay as they are"


def test_a_unified_gpu_that_reports_no_memory_has_its_share(tmp_path: Path) -> None:
    machine = machine_of(gpu_bytes=0, host_bytes=16 * GIB)
    machine = replace(machine, gpus=(replace(machine.gpus[0], is_unified=True),))
    share = divided(machine, CHAIN, request_bytes=GIB)
    assert share.gpus[0].free_bytes + share.memory.available_bytes == 16 * GIB
    assert share.memory.available_bytes - divided(machine, CHAIN).memory.available_bytes == GIB
