"""Every example runs: those of `examples/` as files, and the consoles of pages word for word."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from forked import Forked
from launching import read_jsonl
from tiers import full

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `examples/`, as the current folder, with this interpreter's `zeroinf` on PATH."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in (
        ("zeroinf", f'exec "{sys.executable}" -m zeroinf "$@"'),
        ("srun", 'exec "$@"'),
        ("scontrol", 'echo "$@" >"$REQUEUED"'),
    ):
        (commands / name).write_text(f"#!/bin/sh\n{text}\n")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path / "examples")
    return tmp_path / "examples"


def consoles(page: str) -> Iterator[tuple[str, list[str]]]:
    """Commands of a page's consoles, each with the lines that it shows below."""
    for block in re.findall(r"^```console\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S):
        for part in re.split(r"^\$ ", block, flags=re.M)[1:]:
            command, *lines = part.splitlines()
            yield command, [line for line in lines if line.strip() and line.strip() != "..."]


def masked(line: str) -> str:
    """The words of a line, without the figures of this machine and of this moment."""
    return re.sub(r"[#.]{8,}|\d[\d.,:]*", "N", " ".join(line.split()))


def place_of(line: str, printed: list[str]) -> int | None:
    """Where `line`, which may end in "...", stands among the lines that were printed; None where it does not."""
    begins, cut = masked(line.removesuffix("...")), line.endswith("...")
    found = (at for at, one in enumerate(printed) if (one.startswith(begins) if cut else one == begins))
    return next(found, None)


def run_command(command: str) -> tuple[int, list[str], list[str]]:
    """Exit code, standard output and standard error of a line of a shell."""
    if command.startswith("zeroinf ") and not set("|;&<") & set(command):
        process = Forked(shlex.split(command), os.environ, stdin=False, own_group=False)
        out, err = process.communicate(timeout=200)
        return process.returncode or 0, out.splitlines(), err.splitlines()
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False, executable="/bin/bash")
    return done.returncode, done.stdout.splitlines(), done.stderr.splitlines()


def check(command: str, expected: list[str]) -> None:
    """Run a command and find the lines that a page shows, in their order, in what it prints."""
    code, *streams = run_command(command)
    assert code == 0 or any(line.startswith("error:") for line in expected), (command, code, streams)
    left = [[masked(line) for line in stream] for stream in streams]
    for line in expected:
        places = [place_of(line, stream) for stream in left]
        which = next((number for number, place in enumerate(places) if place is not None), None)
        assert which is not None, f"{command} does not print, or not there: {line}\n{streams}"
        del left[which][: (places[which] or 0) + 1]


@pytest.mark.full
@pytest.mark.parametrize("page", ["README.md", "docs/tutorial.md", "docs/guide/models.md"])
def test_the_page_shows_what_its_commands_print(page: str, folder: Path) -> None:
    os.chdir(folder.parent)
    assert list(consoles(page))
    for command, lines in consoles(page):
        check(command, lines)


def test_a_page_that_shows_something_else_is_noticed(folder: Path) -> None:
    check("printf 'one 17\\ntwo\\nthree\\n'", ["one 18", "th..."])
    for wrong in (["three", "two"], ["four"], ["thr"]):
        with pytest.raises(AssertionError, match="does not print"):
            check("printf 'one\\ntwo\\nthree\\n'", wrong)


@pytest.mark.full
def test_the_notebook_runs_from_top_to_bottom(folder: Path, small_checkpoint: Callable[[str], Path]) -> None:
    notebook = json.loads((folder / "quickstart.ipynb").read_text(encoding="utf-8"))
    names: dict[str, object] = {}
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert "MODEL" in cells[0]
    for cell in [cells[0].replace('"demo"', repr(str(small_checkpoint("llama")))), *cells[1:]]:
        exec(compile(cell.replace('"llama-2-70b"', '"pythia-70m"'), "quickstart.ipynb", "exec"), names)


@pytest.mark.full
def test_the_script_that_streams_runs(
    folder: Path,
    small_checkpoint: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script = (folder / "stream.py").read_text(encoding="utf-8")
    plain = folder / "plain.py"  # the small model has no chat template
    plain.write_text(script.replace("pipe.submit(chat,", "pipe.submit(question,"))
    monkeypatch.setattr(sys, "argv", ["stream.py", str(small_checkpoint("llama"))])
    runpy.run_path(str(plain), run_name="__main__")
    assert capsys.readouterr().out.count("\n    ") == 3


@pytest.mark.full
def test_the_table_of_reviews_is_labelled(folder: Path) -> None:
    subprocess.run(["./label-reviews.sh"], check=True)
    lines = (folder / "labels.csv").read_text(encoding="utf-8").splitlines()
    assert "stars" in lines[0]
    assert [line.partition(",")[0] for line in lines[1:]] == ["r1", "r2", "r3"]


@pytest.mark.full
@pytest.mark.parametrize("name", ["prompts.jsonl", "chats.jsonl", "batch.jsonl"])
def test_the_files_of_prompts_run(name: str, folder: Path) -> None:
    subprocess.run(["zeroinf", "run", "-m", "demo", "-i", name, "-o", "out.jsonl"], check=True)
    assert len(read_jsonl(folder / "out.jsonl")) == len(read_jsonl(folder / name))


@pytest.mark.parametrize(
    ("ends_with", "goes_on"), [("exit 138", True), ("exit 2", False), full('exec PYTHON -m zeroinf "$@"', False)]
)
def test_the_slurm_job_is_put_back_only_when_its_time_was_over(
    ends_with: str, goes_on: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requeued = folder / "requeued"
    for name, value in {"MODEL": "demo", "SLURM_JOB_ID": "7", "REQUEUED": str(requeued)}.items():
        monkeypatch.setenv(name, value)
    (folder.parent / "bin" / "zeroinf").write_text(f"#!/bin/sh\n{ends_with.replace('PYTHON', sys.executable)}\n")
    done = subprocess.run(["bash", "job.slurm"], check=False)
    assert done.returncode == (0 if "exec" in ends_with else int(ends_with.split()[1]))
    assert requeued.exists() == goes_on
    if "exec" in ends_with:
        assert len(read_jsonl(folder / "out.jsonl")) == 4
