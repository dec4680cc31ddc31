"""A display that fails ends no job: its results and its exit code are those of a run that somebody watches."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from launching import command_line, read_jsonl, run_zeroinf, started

from zeroinf.cli.streams import Display

PROMPTS = 12
CLOSED: Mapping[int, str | None] = {0: None, 1: None, 2: None}
FULL: Mapping[int, str | None] = {2: "/dev/full"}


@pytest.fixture
def job(small_checkpoint: Callable[[str], Path], tmp_path: Path) -> list[str]:
    """A job without its output."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"prompt {i}\n" for i in range(PROMPTS)))
    model = str(small_checkpoint("llama"))
    return ["-m", model, "-i", str(prompts), "-b", "2", "--max-new-tokens", "20", "--offload", "cpu"]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


@pytest.mark.parametrize(
    "redirects", [FULL, CLOSED, {0: None}, {1: None}], ids=["full", "closed", "no input", "no output"]
)
def test_a_job_goes_on_without_standard_streams(redirects: Mapping[int, str | None], job: list[str], out: Path) -> None:
    done = run_zeroinf([*job, "-o", str(out)], redirects=redirects)
    assert (done.code, len(read_jsonl(out))) == (0, PROMPTS), done.err
    assert "Traceback" not in done.err


def test_ranks_go_on_without_standard_streams(job: list[str], out: Path) -> None:
    done = run_zeroinf([*job, "-o", str(out)], ranks=2, launcher="num-gpus", redirects=CLOSED)
    assert (done.code, len(read_jsonl(out))) == (0, PROMPTS)


@pytest.mark.full
def test_ranks_of_torchrun_go_on_when_the_disk_of_their_log_is_full(job: list[str], out: Path) -> None:
    command = command_line([*job, "-o", str(out)], ranks=2, launcher="torchrun")
    with Path("/dev/full").open("wb") as full:
        code = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=full, stderr=full, timeout=120).returncode
    assert (code, len(read_jsonl(out))) == (0, PROMPTS)


@pytest.mark.parametrize("kind", ["pipe", "terminal"])
def test_a_job_goes_on_when_its_reader_or_its_terminal_goes(
    kind: str, job: list[str], out: Path, tmp_path: Path
) -> None:
    if kind == "pipe":
        name = str(tmp_path / "pipe")
        os.mkfifo(name)
        reader = os.open(name, os.O_RDONLY | os.O_NONBLOCK)
    else:
        reader, slave = pty.openpty()
        name = os.ttyname(slave)
        os.close(slave)
    with started([*job, "-o", str(out)], redirects={2: name}) as process:
        os.set_blocking(reader, True)
        seen = b""
        while b"plan:" not in seen:
            seen += read_some(reader)
        os.close(reader)
        assert process.wait(60) == 0
    assert len(read_jsonl(out)) == PROMPTS


def read_some(reader: int) -> bytes:
    """What was written; nothing as long as nobody has opened the other end."""
    try:
        return os.read(reader, 1024)
    except OSError:
        return b""


@pytest.mark.parametrize(("name", "why"), [("/dev/full", "No space left on device"), (None, "Bad file descriptor")])
def test_results_that_cannot_be_printed_are_an_error_and_nothing_more(
    name: str | None, why: str, job: list[str]
) -> None:
    done = run_zeroinf(job, redirects={1: name})
    assert done.code == 2
    assert done.err.count(f"cannot write to standard output: {why}; 0 results were printed") == 1
    assert "Traceback" not in done.err
    assert "Exception ignored" not in done.err
    assert "loading weights" not in done.err, "it is found before the work"


@pytest.mark.parametrize("arguments", [["run", "--help"], ["config", "show", "run"]])
@pytest.mark.parametrize("redirect", [">/dev/full", ">&-"])
@pytest.mark.parametrize("buffered", [True, False])
def test_what_a_command_cannot_print_is_an_error(arguments: list[str], redirect: str, buffered: bool) -> None:
    script = f'PYTHONUNBUFFERED={"" if buffered else 1} "$@" {redirect}'
    done = subprocess.run(
        ["bash", "-c", script, "-", sys.executable, "-m", "zeroinf", *arguments], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot write to standard output: ")
    assert len(done.stderr.splitlines()) == 1


def test_a_display_drops_what_cannot_be_written_and_is_its_stream_in_all_else() -> None:
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        display = Display(full)
        display.write("x" * 100_000)
        display.writelines(["a\n", "b\n"])
        display.buffer.write(b"x" * 100_000)
        display.flush()
        assert (display.fileno(), display.encoding, display.isatty()) == (full.fileno(), full.encoding, False)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, full.fileno())  # so that it can be closed
        os.close(null)
