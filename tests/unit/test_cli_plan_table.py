"""`zeroinf plan` for a list of models or GPUs: a table of what fits, with figures that single plans reach."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from test_hardware_presets import GIB

from zeroinf.cli.main import cli
from zeroinf.errors import ModelError, UsageError
from zeroinf.hardware.presets import gpu_names, load_machine, with_gpu
from zeroinf.hardware.rates import Rates
from zeroinf.options import comparison
from zeroinf.options.lists import listed
from zeroinf.options.options import PlanOptions

SHORT = ("-b", "2", "--input-len", "16", "--output-len", "4")


def plan(*arguments: str) -> Any:
    return CliRunner().invoke(cli, ["plan", *arguments, *SHORT])


def test_models_are_planned_side_by_side_and_stand_by_their_size() -> None:
    box = ("--gpu-memory", "2GiB", "--host-memory", "7GiB")
    page = plan("--models", "pythia-2.8b,pythia-70m", *box).stdout
    lines = {line.split()[0]: line for line in page.splitlines() if line.startswith("pythia")}
    assert list(lines) == ["pythia-70m", "pythia-2.8b"]
    assert lines["pythia-70m"].split()[4:6] == ["GPU", "-"], "what fits the GPU needs no packed weights"
    assert lines["pythia-2.8b"].split()[3] == "-", "as it is, it does not fit"
    document = json.loads(plan("--models", "pythia-70m,pythia-2.8b", *box, "--no-advice", "--json").stdout)
    small, large = document["models"]
    assert (small["parameters"], small["outcomes"][0]["rests"]) == (70_426_624, "GPU")
    assert small["outcomes"][0]["job_s"] > small["outcomes"][0]["first_token_s"] > 0
    assert (large["outcomes"], large["problem"].endswith("GiB more host memory would do")) == ([], True)


def test_a_model_whose_own_code_fails_leaves_the_others_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    read = comparison.plan_input_of

    def failing(options: PlanOptions) -> Any:
        if options.model == "pythia-160m":
            raise RuntimeError("shapes differ\nas follows")
        return read(options)

    monkeypatch.setattr(comparison, "plan_input_of", failing)  # for the processes that it forks, too
    page = plan("--models", "pythia-70m,pythia-160m", "--gpu-memory", "2GiB", "--host-memory", "7GiB", "--no-advice")
    lines = {line.split()[0]: line for line in page.stdout.splitlines() if line.startswith("pythia")}
    assert lines["pythia-160m"].endswith("its plan failed: RuntimeError: shapes differ")
    assert "GPU" in lines["pythia-70m"]


def test_a_row_promises_no_more_than_a_plan_by_itself() -> None:
    box = ("--gpu-memory", "1536MiB", "--host-memory", "8GiB", "--no-advice", "--json")
    row = json.loads(plan("--models", "pythia-410m,pythia-70m", *box).stdout)["models"][1]
    alone = json.loads(plan("pythia-410m", *box).stdout)["plan"]
    assert row["name"] == "pythia-410m"
    assert 0.5 * alone["tokens_per_second"] < row["outcomes"][0]["tokens_per_second"]
    assert row["outcomes"][0]["tokens_per_second"] <= 1.001 * alone["tokens_per_second"]


def test_gpus_take_the_place_of_the_machines_own() -> None:
    page = plan("pythia-410m", "--gpus", "t4-16gb,H200", "--host-memory", "16GiB", "--resident-blocks", "0").stdout
    lines = [line for line in page.splitlines() if line.startswith(("t4", "H200"))]
    rates = [float(line.split()[1].replace(",", "")) for line in lines]
    assert len(rates) == 2
    assert rates[0] < rates[1]
    assert "1 x Tesla T4" in plan("pythia-70m", "--gpu", "T4-16GB", "--host-memory", "16GiB", "--no-advice").stdout


def test_a_gpu_comes_with_its_published_rates_and_without_those_of_another() -> None:
    own, other = load_machine("8xA100-80GB-512GiB"), load_machine("1xRTX4090-24GB-64GiB")
    rates = own.rates.updated(Rates.of("measured", nccl_bytes={8: GIB}, hbm_gbps=1800, process_bytes=3 * GIB))
    machine, found = with_gpu(own.machine, rates, "rtx4090-24gb")
    assert [gpu.index for gpu in machine.gpus] == list(range(8))
    assert {gpu.name for gpu in machine.gpus} == {other.machine.gpus[0].name}
    assert machine.memory == own.machine.memory
    assert (found.hbm_gbps, found.origin("hbm_gbps")) == (1008, "data sheet")
    assert (found.nccl_bytes, found.all_gather_gbps, found.process_bytes) == (None, None, 3 * GIB)
    assert {"A100-80GB", "H200", "RTX4090-24GB"} <= set(gpu_names())


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        (["pythia-70m,pythia-70n"], ModelError, "pythia-70n"),
        (["pythia-70m", "--gpu", "RTX4091-24GB"], UsageError, "did you mean RTX4090-24GB"),
        (["all", "--gpus", "all"], UsageError, "one of them makes a table"),
        (["all", "--explain"], UsageError, "--explain"),
        (["all", "--plot", "x.png"], UsageError, "--plot"),
    ],
)
def test_mistakes_are_named_before_anything_is_planned(arguments: list[str], error: Any, named: str) -> None:
    found = plan(*arguments).exception
    assert isinstance(found, error), found
    assert named in f"{found.message} {found.hint}"


def test_a_folder_whose_name_has_a_comma_is_one_model(tmp_path: Path) -> None:
    folder = tmp_path / "one,two"
    folder.mkdir()
    assert listed(PlanOptions(model=str(folder))) == (None, ())
    assert len(listed(PlanOptions(model="all"))[1]) > 60
