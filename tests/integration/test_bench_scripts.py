"""Benchmark scripts, tried with a small model: each cell is a line of figures, and so is one that fails."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiers import full

SCRIPTS = Path(__file__).parents[2] / "scripts"


def lines(script: str, *arguments: str) -> list[dict[str, Any]]:
    done = subprocess.run([sys.executable, SCRIPTS / script, *arguments], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("bench-throughput", ("--cells", "2x2", "--prompt-tokens", "4", "--lengths", "2", "--requests", "2")),
        full("bench-scaling", ("--gpus", "1,9", "--engines", "stream", "--rows", "2", "--new-tokens", "2")),
    ],
)
def test_figures_of_a_cell(script: str, arguments: tuple[str, ...], small_checkpoint: Callable[[str], Path]) -> None:
    first, *others = lines(script, "--models", str(small_checkpoint("llama")), *arguments)
    assert first["tok_s"] > 0
    assert ["needs 9 GPUs" in other["skipped"] for other in others] == [True] * (script == "bench-scaling")


@pytest.mark.full
def test_a_planned_cell_stands_beside_its_run(tmp_path: Path, small_checkpoint: Callable[[str], Path]) -> None:
    cell = f"{small_checkpoint('llama')}/cpu/8/1"
    command = [sys.executable, SCRIPTS / "bench-plan", cell, "--new-tokens", "4", "--most-rows", "2"]
    subprocess.run([*command, "--out", tmp_path / "out"], capture_output=True, timeout=200, check=True)
    row = json.loads((tmp_path / "out").read_text())
    assert row["rows"] == 2
    assert all(planned > 0 and measured > 0 for planned, measured in (row["step"], row["speed"]))


def test_a_cell_that_fails(small_checkpoint: Callable[[str], Path]) -> None:
    (found,) = lines(
        "bench-throughput", "--models", str(small_checkpoint("llama")), "--cells", "2x3", "--prompt-tokens", "4"
    )
    assert found["code"] == 2
    assert "--micro-batch-rows" in found["error"]


@pytest.mark.full
def test_a_model_that_is_not_there_fails_its_cells_only(tmp_path: Path) -> None:
    (found,) = lines("bench-throughput", "--models", str(tmp_path), "--cells", "2x2", "--requests", "2")
    assert found["code"] > 0
    assert str(tmp_path) in found["error"]


@pytest.mark.full
def test_a_start_is_told_by_its_phases() -> None:
    run = "run -m demo --prompt x --max-new-tokens 1"
    command = [sys.executable, SCRIPTS / "bench-start", "--runs", "1", "--command", run, "--command", "run -m ./absent"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    header, started, refused, reference = (line.split(" | ") for line in done.stdout.splitlines())
    figures = dict(zip(header, started, strict=True))
    assert all(float(figures[phase]) > 0 for phase in header[2:])
    assert dict(zip(header, refused, strict=True))["imports"] == ""
    assert reference[0].startswith("python -c 'import torch, transformers': ")


@pytest.mark.full
def test_plans_of_the_catalog_take_imports_and_more() -> None:
    command = [sys.executable, SCRIPTS / "bench-start", "--catalog", "1xH200", "llama-3.2-1b", "pythia-70m"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    imports, *plans = done.stdout.splitlines()
    alone = float(imports.removeprefix("imports: "))
    found = {model: float(seconds) for model, seconds in (line.split(" | ") for line in plans)}
    assert list(found) == ["llama-3.2-1b", "pythia-70m"]
    assert all(seconds > alone > 0 for seconds in found.values())
