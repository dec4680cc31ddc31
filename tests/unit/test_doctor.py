"""`zeroinf doctor` as a user meets it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields, replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from click.testing import CliRunner

from zeroinf.cli.doctor import doctor
from zeroinf.cli.rates import rate_rows
from zeroinf.errors import EnvironmentProblem
from zeroinf.hardware.disk import read_disk
from zeroinf.hardware.measure import all_rates as measure_module
from zeroinf.hardware.measure.disk_rate import measure_disk
from zeroinf.hardware.presets import load_machine
from zeroinf.hardware.profile import keep_profile, read_profile
from zeroinf.hardware.rates import Rates
from zeroinf.hardware.snapshot import read_machine


@pytest.fixture(autouse=True)
def no_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Answers depend neither on the GPUs of the machine that runs the tests nor on what was measured there."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("ZEROINF_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def quick_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        measure_module, "measure_disk", lambda folder: measure_disk(folder, file_bytes=16 << 20, read_s=0.01)
    )
    monkeypatch.setattr(measure_module, "measure_page_reads", lambda folder: 80_000.0)
    monkeypatch.setattr(measure_module, "measure_host_copy", lambda: (12.5, 25.0))
    monkeypatch.setattr(measure_module, "measure_host_read", lambda: 60.0)


def test_table_gives_each_check_a_line_and_each_trouble_a_hint(tmp_path: Path) -> None:
    result = CliRunner().invoke(doctor, ["--nvme-path", str(tmp_path)])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert any(line.startswith("ok   python") for line in lines)
    assert any(f" NVMe {tmp_path} " in line for line in lines), "long lines are not broken"
    warning = next(index for index, line in enumerate(lines) if line.startswith("warn GPUs"))
    assert lines[warning + 1].startswith("     hint: ")


def test_missing_folder_that_was_asked_for_ends_in_an_environment_problem_after_the_table(tmp_path: Path) -> None:
    absent = tmp_path / "absent [brackets]"
    result = CliRunner().invoke(doctor, ["--nvme-path", str(absent)])
    assert isinstance(result.exception, EnvironmentProblem)
    assert result.exception.exit_code == 4
    assert f"NVMe {absent}" in result.exception.message
    assert f"FAIL NVMe {absent}" in result.stdout


def test_more_gpus_than_there_are_end_in_an_environment_problem() -> None:
    result = CliRunner().invoke(doctor, ["--num-gpus", "1"])
    assert isinstance(result.exception, EnvironmentProblem)
    assert "GPUs (1 asked for, 0 visible)" in result.exception.message


def test_stale_build_lock_is_named_and_fails_for_deepspeed_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "async_io" / "lock"
    lock.parent.mkdir()
    lock.touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert f"left by a killed build: {lock}" in CliRunner().invoke(doctor, []).stdout
    assert CliRunner().invoke(doctor, ["--offload", "nvme"]).exit_code == 0
    result = CliRunner().invoke(doctor, ["--offload", "nvme", "--engine", "zero"])
    assert isinstance(result.exception, EnvironmentProblem)
    assert str(lock) in result.exception.message


def test_json_is_one_object_with_checks_and_machine_even_when_checks_fail(tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    result = CliRunner().invoke(doctor, ["--json", "--nvme-path", str(tmp_path), "--nvme-path", str(absent)])
    assert isinstance(result.exception, EnvironmentProblem)
    report = json.loads(result.stdout)
    assert report["schema"] == 1
    assert {check["name"]: check["status"] for check in report["checks"]}[f"NVMe {absent}"] == "fail"
    assert report["machine"]["gpus"] == []
    assert [disk["path"] for disk in report["machine"]["disks"]] == [str(tmp_path), str(absent)]
    assert report["machine"]["memory"]["total_bytes"] > 0


@pytest.mark.usefixtures("quick_measurements")
def test_measured_rates_are_printed_and_found_again_by_the_next_doctor(tmp_path: Path) -> None:
    assert "warn rates" in CliRunner().invoke(doctor, []).stdout
    measured = CliRunner().invoke(doctor, ["--measure"])
    assert measured.exit_code == 0, measured.output
    assert "measuring host memory ..." in measured.stderr
    assert "rate host memory copy        12.5 GB/s" in measured.stdout.splitlines()
    assert "rate host memory read        60.0 GB/s" in measured.stdout.splitlines()
    after = json.loads(CliRunner().invoke(doctor, ["--json"]).stdout)
    assert after["rates"]["host_copy_gbps"] == 12.5
    names = ("host_copy_gbps", "host_recopy_gbps", "host_read_gbps")
    assert after["rates"]["origins"] == dict.fromkeys(names, "measured")
    assert Path(after["profile"]["path"]).is_file()


def test_what_a_run_alone_has_measured_is_no_profile_of_the_machine() -> None:
    keep_profile(read_machine(), Rates.of("measured", host_read_gbps=60.0), now=datetime.now(UTC))
    stdout = CliRunner().invoke(doctor, []).stdout
    assert "warn rates" in stdout
    assert "only what a run has measured: host_read_gbps" in stdout


@pytest.mark.usefixtures("quick_measurements")
def test_json_of_a_measured_machine_is_a_machine_to_plan_for_elsewhere(tmp_path: Path) -> None:
    if not read_disk(tmp_path).o_direct:
        pytest.skip("the temporary folder has no O_DIRECT")
    result = CliRunner().invoke(doctor, ["--measure", "--json", "--nvme-path", str(tmp_path)])
    assert result.exit_code == 0, result.output
    box = tmp_path / "box.json"
    box.write_text(result.stdout)
    found = load_machine(str(box))
    assert found.machine == replace(read_machine([tmp_path]), memory=found.machine.memory, disks=found.machine.disks)
    assert found.machine.disks[0].path == tmp_path
    assert found.rates == read_profile(found.machine)
    assert found.rates.of_disk(found.machine.disks[0])


def test_broken_profile_is_a_warning_and_not_the_end(tmp_path: Path) -> None:
    path = keep_profile(read_machine(), Rates.of("measured", host_copy_gbps=12.5), now=datetime.now(UTC))
    path.write_text("{")
    result = CliRunner().invoke(doctor, [])
    assert result.exit_code == 0, result.output
    assert f"warn rates          not used: {path} is broken" in result.stdout


def test_rates_print_with_units_and_an_origin_where_they_were_not_measured() -> None:
    rates = Rates(
        link_gbps=31.5,
        links_gbps={1: 25.04, 2: 50.1},
        launch_s=3.2e-6,
        model_launch_s=14.5e-6,
        context_bytes=512 << 20,
        matmul_tflops={"bfloat16": {1: 4.6, 8192: 788.4}},
        origins={
            "links_gbps": "measured",
            "launch_s": "measured",
            "model_launch_s": "measured",
            "context_bytes": "measured",
            "matmul_tflops": "data sheet",
        },
    )
    assert dict(rate_rows(rates)) == {
        "link of one GPU": "31.5 GB/s (given)",
        "links at once": "GB/s by GPUs: 1: 25, 2: 50.1",
        "matmul bfloat16": "TFLOP/s by rows: 1: 4.6, 8192: 788 (data sheet)",
        "kernel launch": "3.2 us",
        "a model's kernel launch": "14.5 us",
        "CUDA context": "0.50 GiB",
    }


def test_every_rate_has_a_row() -> None:
    tables = {"links_gbps", "all_gather_gbps", "nccl_bytes"}
    special = {"disk_gbps": {"/d": 1.0}, "disk_reads_per_s": {"/d": 1.0}, "matmul_tflops": {"d": {1: 1.0}}}
    for field in fields(Rates):
        if field.name not in ("origins", "disk_gbps_by_requests"):
            value = special.get(field.name, {2: 1} if field.name in tables else 1)
            assert len(list(rate_rows(Rates.of("measured", **{field.name: value})))) == 1, field.name


def test_help_names_every_option() -> None:
    output = CliRunner().invoke(doctor, ["--help"]).output
    for option in ("--nvme-path", "--offload", "--num-gpus", "--measure", "--json"):
        assert option in output


def test_command_loads_nothing_heavy_before_it_runs() -> None:
    program = """
import sys
import zeroinf.cli.doctor
print(*({"torch", "deepspeed", "psutil", "rich", "zeroinf.hardware.checks"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
