"""`zeroinf doctor` as a user meets it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from zeroinf.cli.doctor import doctor
from zeroinf.errors import EnvironmentProblem


@pytest.fixture(autouse=True)
def no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answers below do not depend on the GPUs of the machine that runs the tests."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


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


def test_stale_build_lock_fails_for_nvme_and_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / "async_io" / "lock"
    lock.parent.mkdir()
    lock.touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert f"left by a killed build: {lock}" in CliRunner().invoke(doctor, []).stdout
    result = CliRunner().invoke(doctor, ["--offload", "nvme"])
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


def test_help_names_every_option() -> None:
    output = CliRunner().invoke(doctor, ["--help"]).output
    for option in ("--nvme-path", "--offload", "--num-gpus", "--json"):
        assert option in output


def test_command_loads_nothing_heavy_before_it_runs() -> None:
    program = """
import sys
import zeroinf.cli.doctor
print(*({"torch", "deepspeed", "psutil", "rich", "zeroinf.hardware.checks"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
