"""`zeroinf bench` on the command line: what it refuses, what it says beforehand, and how two of its files compare."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from test_bench import CELL, MACHINE, failed, ok, results

from zeroinf.bench import runner
from zeroinf.bench.matrix import BenchmarkSettings, Cell
from zeroinf.bench.results import Results, machine_record
from zeroinf.cli.main import cli
from zeroinf.hardware.profile import read_profile
from zeroinf.hardware.snapshot import read_machine


def bench(*words: str) -> Result:
    return CliRunner().invoke(cli, ["bench", *words], standalone_mode=False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no model to run"),
        (["-m", "m", "--overwrite"], "--overwrite without --output-file"),
        (["-m", "m", "--offload", "nvme"], "--offload nvme needs --nvme-path"),
        (["-m", "m", "--offload", "moon"], "no target 'moon'"),
        (["-m", "m", "--prompt", "x", "--input-len", "8"], "contradict each other"),
        (["-m", "m", "--resident-blocks", "some"], "--resident-blocks some"),
        (["-m", "m", "--engines", "fast"], "no engine 'fast'"),
        (["-m", "m", "--time-limit-s", "9"], "--time-limit-s without --output-file"),
        (["-m", "m", "-o", "/nowhere/x.json"], "its folder does not exist"),
        (["-m", "m", "--plot", "/nowhere/x.png"], "its folder does not exist"),
        (["-m", "m", "--device", "cuda"], "shows no GPU"),
        (["-m", "m", "--engines", "stream/replicated,zero"], "stream/replicated has no cell"),
        (["-m", "m", "--engines", "resident", "--offload", "cpu"], "--offload cpu has no effect"),
        (["-m", "m", "--nvme-path", "."], "--nvme-path has no effect"),
        (["-m", "m", "--engines", "zero", "--resident-blocks", "1"], "--resident-blocks has no effect"),
        (["-m", "m", "--dry-run", "--format", "json"], "--dry-run has none"),
        (["-b", "2", "compare", __file__, __file__], "--batch-size has no effect before `compare`"),
    ],
)
def test_what_cannot_be_benchmarked_is_refused_before_anything_runs(words: list[str], message: str) -> None:
    raised = bench(*words).exception
    assert raised is not None
    assert message in str(raised)


def test_a_dry_run_prints_every_cell_with_its_expected_time_and_runs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "run_cell", lambda *args: pytest.fail("it ran"))
    found = bench(
        *("--engines", "resident,tensor-parallel", "-m", "pythia-70m", "-b", "1", "--random-weights", "--dry-run")
    )
    lines = found.stdout.splitlines()
    assert len(lines) == 3
    assert "?" not in lines[1]
    assert "the planner has no model of the engine" in lines[2]
    assert "2 cells to run" in found.stderr
    assert "1 cells that nobody can time" in found.stderr


def test_the_mii_benchmarks_flags_are_taken_and_its_prompt_has_no_length_asked_for(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").touch()
    words = [
        "--preset",
        "mii",
        "--engines",
        "tensor-parallel",
        "--models-dir",
        str(tmp_path),
        "--prompt",
        "DeepSpeed is",
    ]
    words += ["--max-tokens", "7", "--repetitions", "2", "--log-file", str(tmp_path / "r.json"), "--device", "cpu"]
    heads, *rows = bench(*words, "--dry-run", "--format", "csv").stdout.splitlines()
    assert heads.startswith("model,engine,offload,GPUs,batch,prompt,new,")
    assert [row.partition(",?")[0] for row in rows] == [
        f"{tmp_path / name},tensor-parallel,none,1,1,given,7" for name in ("a", "b")
    ]


def test_a_dry_run_says_which_cells_have_run(tmp_path: Path) -> None:
    words = ["--engines", "tensor-parallel", "-m", "m", "-b", "1,2", "-o", str(tmp_path / "r.json")]
    done = Cell(
        engine="tensor-parallel", model="m", offload="none", batch_size=1, input_len=128, output_len=32, num_gpus=1
    )
    machine = machine_record(read_machine(()), read_profile(read_machine(())).known)
    replace(results(failed(done)), machine=machine).save(tmp_path / "r.json")
    found = bench(*words, "--dry-run")
    assert [line.rpartition("  ")[2].strip() for line in found.stdout.splitlines()[1:]] == [
        "has run: out of memory",
        "the planner has no model of the engine",
    ]
    assert "1 cells to run" in found.stderr


def test_a_comparison_says_what_it_leaves_out_and_what_else_differs(tmp_path: Path) -> None:
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    results(ok(), ok(replace(CELL, batch_size=64))).save(first)
    other = Results(
        machine={**MACHINE, "driver": "7"}, settings=BenchmarkSettings(repetitions=9).to_json(), outcomes=(ok(),)
    )
    other.save(second)
    found = bench("compare", str(first), str(second), "--format", "csv")
    assert found.stdout.splitlines()[1] == "m,stream,cpu,1,2,8,4,6.00 ± 2.83,6.00 ± 2.83,1.000 ± 0.667"
    assert found.stderr.splitlines() == [
        f"1 cells are in {first} only",
        "the settings differ: repetitions",
        "the machines differ: driver",
    ]


def test_the_record_names_the_machine_and_its_versions() -> None:
    machine = read_machine(())
    record = machine_record(machine, read_profile(machine).known)
    assert record["versions"].keys() >= {"python", "torch", "transformers", "deepspeed", "accelerate"}
    assert record["memory"]["total_bytes"] == machine.memory.total_bytes
    assert record.keys() >= {"hostname", "driver", "gpus", "gpu_names", "rates"}
