"""Rates of a real GPU are there, and agree with what anybody knows of GPUs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from zeroinf.cli.doctor import doctor
from zeroinf.hardware.gpus import read_gpus, read_used_bytes
from zeroinf.hardware.machine import Machine
from zeroinf.hardware.measure.all_rates import measure_machine
from zeroinf.hardware.rates import Rates
from zeroinf.hardware.snapshot import read_machine

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

ON_ONE_GPU = {
    "link_gbps", "links_gbps", "matmul_tflops", "hbm_gbps", "context_bytes", "process_bytes", "workspace_bytes",
    "launch_s", "model_launch_s", "page_lock_gbps", "host_copy_gbps", "host_recopy_gbps",
}  # fmt: skip
ON_SEVERAL = {"all_gather_gbps", "nccl_bytes", "shared_copy_gbps", "shared_page_lock_gbps"}


@pytest.fixture(scope="module")
def measured() -> tuple[Machine, Rates, list[str]]:
    machine, said = read_machine(), []
    return machine, measure_machine(machine, said.append), said


def test_every_rate_is_measured(measured: tuple[Machine, Rates, list[str]]) -> None:
    machine, rates, said = measured
    expected = ON_ONE_GPU | (ON_SEVERAL if len(machine.gpus) > 1 else set())
    assert set(rates.known) == expected, said


def test_links_together_carry_more_than_one_and_no_more_than_their_sum(
    measured: tuple[Machine, Rates, list[str]],
) -> None:
    machine, rates, _ = measured
    assert rates.links_gbps is not None
    assert rates.link_gbps is not None
    assert max(rates.links_gbps) == len(machine.gpus)
    assert rates.links_gbps[1] == rates.link_gbps
    assert all(0.9 * rates.link_gbps < gbps < 1.2 * n * rates.link_gbps for n, gbps in rates.links_gbps.items())


def test_more_rows_use_more_of_the_gpu(measured: tuple[Machine, Rates, list[str]]) -> None:
    _, rates, _ = measured
    assert rates.matmul_tflops is not None
    for by_rows in rates.matmul_tflops.values():
        assert by_rows[1] < by_rows[64] < by_rows[8192]


def test_one_row_reads_its_weight_no_faster_than_the_memory_is(measured: tuple[Machine, Rates, list[str]]) -> None:
    _, rates, _ = measured
    assert rates.matmul_tflops is not None
    assert rates.hbm_gbps is not None
    assert rates.matmul_tflops["float16"][1] * 1e3 < 1.3 * rates.hbm_gbps, "one operation a byte of a 16-bit weight"


def test_a_models_python_takes_longer_than_a_launch(measured: tuple[Machine, Rates, list[str]]) -> None:
    _, rates, _ = measured
    assert rates.launch_s is not None
    assert rates.model_launch_s is not None
    assert rates.launch_s < rates.model_launch_s < 100 * rates.launch_s


def test_what_a_process_holds_is_what_nvml_sees(measured: tuple[Machine, Rates, list[str]]) -> None:
    _, rates, _ = measured
    assert rates.context_bytes is not None
    assert rates.process_bytes is not None
    assert 256 << 20 < rates.process_bytes < 8 << 30
    assert rates.workspace_bytes is not None
    assert 100 << 20 < rates.context_bytes < 4 << 30
    assert 0 < rates.workspace_bytes < 1 << 30
    torch.zeros(1, device="cuda")
    uuid = read_gpus()[0].uuid
    assert uuid is not None
    assert read_used_bytes(uuid) > torch.cuda.memory_reserved()


def test_doctor_keeps_what_it_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZEROINF_CACHE", str(tmp_path))
    result = CliRunner().invoke(doctor, ["--measure", "--json"])
    assert result.exit_code == 0, result.output
    again = CliRunner().invoke(doctor, ["--json"])
    assert json.loads(again.stdout)["rates"] == json.loads(result.stdout)["rates"]
    assert json.loads(again.stdout)["rates"]["link_gbps"] > 0
