"""A benchmark's cells are processes of their own: what becomes of them is a value, and nothing is lost or run twice."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from test_bench import CELL, REPORT, results

from zeroinf.bench import runner
from zeroinf.bench.matrix import BenchmarkSettings
from zeroinf.bench.results import CellResult, read_results
from zeroinf.bench.runner import run_cell, run_cells
from zeroinf.cli.main import main

FakePython = Callable[[str], Path]
PATIENCE_S = 60.0


@pytest.fixture
def fake_python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakePython:
    """Cells run the shell script that it is given; `$rows` and `$report` are what `zeroinf run` was told."""
    (tmp_path / "report.json").write_text(json.dumps(REPORT))

    def use(script: str) -> Path:
        fake = tmp_path / "python"
        words = 'for word in "$@"; do case $last in -b) rows=$word;; --report) report=$word;; esac; last=$word; done'
        fake.write_text(f"#!/bin/sh\ncd {tmp_path}\n{words}\n{script}\n")
        fake.chmod(0o755)
        monkeypatch.setattr(runner.sys, "executable", str(fake))
        return tmp_path

    return use


def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("script", "status", "words"),
    [
        ("echo 'error: out of GPU memory with 4 rows: CUDA' >&2; exit 3", "out of memory", "with 4 rows"),
        ("echo 'RuntimeError: you can'\\''t allocate memory' >&2; exit 1", "out of memory", "allocate"),
        ("echo 'error: nothing fits: ...' >&2; exit 3", "does not fit", "nothing fits"),
        ("echo 'error: no such model' >&2; exit 2", "refused", "no such model"),
        ("echo one >&2; echo two >&2; exit 1", "failed", "one / two"),
        ("exit 9", "failed", "exit code 9"),
        ("kill -9 $$", "failed", "killed by SIGKILL: the system kills what takes the last of the host memory"),
        ("sleep 60", "timeout", "more than 0.5 s"),
    ],
)
def test_a_failure_is_a_cells_value(script: str, status: str, words: str, fake_python: FakePython) -> None:
    fake_python(script)
    found = run_cell(CELL, BenchmarkSettings(cell_limit_s=0.5 if status == "timeout" else 60), "x")
    assert found.status == status
    assert words in found.message
    assert not found.figures


def test_a_model_that_cannot_be_read_is_its_cells_value_and_the_others_run(fake_python: FakePython) -> None:
    fake_python('cp report.json "$report"')
    cells = [replace(CELL, model="./nowhere"), replace(CELL, input_len=None)]
    said: list[CellResult] = []
    run_cells(
        cells, BenchmarkSettings(prompt="x"), results(), done=lambda one, _: said.append(one), begins=lambda *_: None
    )
    assert [one.status for one in said] == ["refused", "ok"]
    assert "nowhere" in said[0].message


def test_ranks_in_sessions_of_their_own_end_with_their_cell(fake_python: FakePython) -> None:
    folder = fake_python("setsid sh -c 'echo $$ > rank; while :; do sleep 0.1; done' - \"$report\" & wait")
    assert run_cell(CELL, BenchmarkSettings(cell_limit_s=1.0), "x").status == "timeout"
    rank = int((folder / "rank").read_text())
    eventually(lambda: not psutil.pid_exists(rank))


def started(folder: Path) -> int:
    """`zeroinf bench` in a process of its own, with three cells."""
    words = ["bench", "-m", "m", "-b", "2,4,8", "--prompt", "x", "-o", str(folder / "r.json")]
    if pid := os.fork():
        return pid
    try:
        os.dup2(os.open(folder / "said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        os.dup2(2, 1)
        sys.argv[1:] = words
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        main()
    except SystemExit as ended:
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(int(ended.code or 0))
    finally:
        os._exit(77)


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_benchmark_that_is_stopped_in_a_cell_goes_on_with_it(number: int, code: int, fake_python: FakePython) -> None:
    wait = "if [ $rows = 4 ] && [ ! -e again ]; then touch again; echo $$ > cell; exec sleep 60; fi"
    folder = fake_python(f'echo $rows >> log\n{wait}\ncp report.json "$report"')
    first = started(folder)
    eventually(lambda: (folder / "cell").is_file() and (folder / "cell").read_text() != "")
    cell = psutil.Process(int((folder / "cell").read_text()))
    os.kill(first, number)
    assert ended(first) == code
    eventually(lambda: not cell.is_running() or cell.status() == psutil.STATUS_ZOMBIE)
    assert [one.cell.batch_size for one in read_results(folder / "r.json").outcomes] == [2]
    if number != signal.SIGKILL:
        said = (folder / "said").read_text()
        assert f"go on with: zeroinf bench -m m -b 2,4,8 --prompt x -o {folder / 'r.json'}" in said

    assert ended(started(folder)) == 0
    assert (folder / "log").read_text().split() == ["2", "4", "4", "8"]
    assert [(one.cell.batch_size, one.status) for one in read_results(folder / "r.json").outcomes] == [
        (2, "ok"),
        (4, "ok"),
        (8, "ok"),
    ]


def test_a_cell_that_is_told_to_stop_stops_the_benchmark_and_has_no_value(fake_python: FakePython) -> None:
    folder = fake_python("exit 143")
    assert ended(started(folder)) == 143
    assert read_results(folder / "r.json").outcomes == ()
