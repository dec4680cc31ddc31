"""What the command line says and does about jobs that were stopped, are mostly bad, or must not lose a file."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from click.testing import CliRunner
from launching import journalled, read_jsonl, write_jsonl
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from zeroinf import generate, pipeline
from zeroinf.cli import run as command
from zeroinf.cli.main import cli, main
from zeroinf.errors import RequestsFailedError
from zeroinf.jobs.output_files import errors_path, journal_path
from zeroinf.runs.interrupts import interrupted
from zeroinf.runs.request_feed import RequestFeed
from zeroinf.service import loaded

ODD = "a $(touch trapped) `touch trapped` ;'\"&|*\\ b"
ENTRIES = [{"id": f"r{i}", "prompt": f"word {i}", "max_new_tokens": 1 + i, "ignore_eos": True} for i in range(5)]

Zeroinf = Callable[..., tuple[int, str]]


@pytest.fixture
def zeroinf(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Zeroinf:
    """`zeroinf(*arguments)` as a user types it, in this process: its exit code and standard error."""
    monkeypatch.setenv("PATH", os.environ["PATH"])

    def call(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["zeroinf", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        return int(caught.value.code or 0), capfd.readouterr().err

    return call


class Asked(NamedTuple):
    """A job whose names hold all that a shell would interpret."""

    run: tuple[str, ...]
    out: Path


@pytest.fixture
def job(small_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Asked:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / ODD
    shutil.copytree(small_checkpoint("llama"), folder / "model")
    requests = write_jsonl(folder / "in.jsonl", ENTRIES)
    asked = ("-m", str(folder / "model"), "-i", str(requests), "--prompt", ODD, "--max-new-tokens", "3", "-b", "2")
    return Asked(("run", *asked, "--offload", "cpu", "-o", str(folder / "out.jsonl")), folder / "out.jsonl")


@pytest.fixture
def stopped(job: Asked, zeroinf: Zeroinf, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the run said that was stopped after two results."""
    done, count = RequestFeed.done, iter(range(100))

    def stopping(self: RequestFeed, row: Any) -> None:
        if next(count) == 2:
            raise interrupted(15)
        done(self, row)

    with monkeypatch.context() as patch:
        patch.setattr(RequestFeed, "done", stopping)
        code, said = zeroinf(*job.run)
    assert code == 143
    assert len(journalled(journal_path(job.out))) == 2
    return said


def complete(job: Asked) -> None:
    assert [line["id"] for line in read_jsonl(job.out)] == ["request-1", *(entry["id"] for entry in ENTRIES)]
    assert [line["completion_tokens"] for line in read_jsonl(job.out)][1:] == [1, 2, 3, 4, 5]
    assert not list(Path.cwd().rglob("trapped"))


def test_the_command_that_a_stopped_run_prints_goes_on_when_it_is_pasted_into_a_shell(
    job: Asked, stopped: str, zeroinf: Zeroinf
) -> None:
    (told,) = re.findall(r"; to go on: (zeroinf .*)", stopped)
    shell = ["bash", "-c", f"zeroinf() {{ printf '%s\\0' \"$@\"; }}\n{told}"]
    words = subprocess.run(shell, capture_output=True, text=True, check=True).stdout.split("\0")[:-1]
    assert words == [*job.run, "--resume"]
    code, said = zeroinf(*words)
    assert code == 0
    assert "resuming with 2 of 6 results" in said
    complete(job)


@pytest.mark.parametrize("answer", [True, False, None])
def test_the_same_command_offers_to_go_on_where_somebody_can_answer_and_else_says_how(
    answer: bool | None, job: Asked, stopped: str, zeroinf: Zeroinf, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions: list[str] = []
    for stream in ("stdin", "stderr"):
        monkeypatch.setattr(f"sys.{stream}.isatty", lambda: answer is not None)
    monkeypatch.setattr(command.click, "confirm", lambda text, **how: questions.append(text) or answer)
    before = journal_path(job.out).read_bytes()
    code, said = zeroinf(*job.run)
    holds = f"{journal_path(job.out)} holds 2 results"
    assert questions == ([] if answer is None else [f"{holds}: go on with it?"])
    if answer:
        assert code == 0
        assert "resuming with 2 of 6 results" in said
        complete(job)
    else:
        assert code == 2
        assert f"error: {holds} of an earlier run\n\nhint: pass --resume to go on with it, or --overwrite" in said
        assert journal_path(job.out).read_bytes() == before


def test_a_forced_resume_is_on_record_in_the_journal_and_told_by_status(
    job: Asked, stopped: str, zeroinf: Zeroinf
) -> None:
    code, said = zeroinf(*job.run, "--dtype", "bfloat16", "--resume")
    assert (code, "of another job: dtype was float32, is bfloat16" in said) == (2, True)
    code, said = zeroinf(*job.run, "--dtype", "bfloat16", "--resume-anyway")
    assert (code, "this output mixes results of two jobs, which differ in dtype" in said) == (0, True)
    complete(job)
    told = CliRunner().invoke(cli, ["status", str(job.out)], catch_exceptions=False).stdout
    assert told.startswith("finished: 6 done")
    assert "results of jobs that differ in dtype" in told


def test_a_finished_job_whose_input_has_grown_runs_the_new_lines_and_replaces_its_output(
    job: Asked, stopped: str, zeroinf: Zeroinf
) -> None:
    assert zeroinf(*job.run, "--resume")[0] == 0
    before = read_jsonl(job.out)
    requests = Path(job.run[job.run.index("-i") + 1])
    write_jsonl(requests, [*ENTRIES, {"id": "r5", "prompt": "word 5", "max_new_tokens": 1}])
    code, said = zeroinf(*job.run, "--resume-anyway")
    assert (code, "resuming with 6 of 7 results" in said) == (0, True), said
    after = read_jsonl(job.out)
    assert (after[:-1], after[-1]["id"]) == (before, "r5")


# Jobs that are mostly bad

BAD = [{"id": "long", "prompt": "x" * 300}, {"id": "hot", "prompt": "x", "temperature": -1}, "no object"]


@pytest.fixture
def bad(job: Asked) -> Asked:
    """Three of four requests cannot be run: one is found to be too long only once it has been tokenised."""
    requests = write_jsonl(job.out.parent / "bad.jsonl", [*BAD, {"id": "good", "prompt": "fine"}])
    where = job.run.index("-i") + 1
    without_prompt = [*job.run[:where], str(requests), *job.run[where + 3 :]]
    return Asked(tuple(without_prompt), job.out)


def refused_lines(job: Asked) -> list[tuple[int, str]]:
    return [(line["line"], line["error"]) for line in read_jsonl(errors_path(job.out))]


def test_a_job_that_is_mostly_bad_stops_before_the_work_and_names_every_bad_line(
    bad: Asked, zeroinf: Zeroinf, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(loaded, "load_engine", lambda *args: pytest.fail("weights are being loaded"))
        code, said = zeroinf(*bad.run, "--max-error-rate", "0.7")
    assert code == 5
    assert "error: 3 of 4 requests were refused, more than --max-error-rate 0.7" in said
    assert f"see {errors_path(bad.out)}; nothing was run" in said
    lines = refused_lines(bad)
    assert [number for number, _ in lines] == [1, 2, 3]
    for word, (_, reason) in zip(("context", "temperature", "object"), lines, strict=True):
        assert word in reason
    assert not bad.out.exists()
    mended = write_jsonl(bad.out.parent / "bad.jsonl", [{"id": "good", "prompt": "fine"}])
    code, said = zeroinf(*bad.run, "--max-error-rate", "0.7")
    assert code == 0, f"nothing is in the way of {mended}"
    assert [line["id"] for line in read_jsonl(bad.out)] == ["good"]
    assert not errors_path(bad.out).exists()


def test_as_many_bad_lines_as_are_allowed_do_not_stop_a_job(bad: Asked, zeroinf: Zeroinf) -> None:
    code, said = zeroinf(*bad.run, "--max-error-rate", "0.75")
    assert code == 5
    assert f"error: 3 of 4 requests were refused\n\nhint: see {errors_path(bad.out)}" in said
    assert [line["id"] for line in read_jsonl(bad.out)] == ["good"]
    assert [number for number, _ in refused_lines(bad)] == [1, 2, 3]


# Requests for which the model's scores are not numbers

SOME_FAIL = [
    {"id": "good", "prompt": "fine"},
    {"id": "broken", "prompt": "not ~ fine"},
    {"id": "hot", "prompt": "x", "temperature": -1},
    {"id": "too", "prompt": "~"},
    {"id": "last", "prompt": "fine as well", "logprobs": 1},
]


@pytest.fixture
def failing(job: Asked) -> Asked:
    """A model for which ~ is no number, and requests some of which hold it."""
    model = job.out.parent / "model"
    weights = load_file(model / "model.safetensors")
    (token,) = AutoTokenizer.from_pretrained(model)("~", add_special_tokens=False)["input_ids"]
    weights["model.embed_tokens.weight"][token] = float("nan")
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    requests = write_jsonl(job.out.parent / "failing.jsonl", SOME_FAIL)
    where = job.run.index("-i") + 1
    run = [*job.run[:where], str(requests), *job.run[where + 3 :]]
    run[run.index("-b") + 1] = "4"  # those that fail end in the first pass
    return Asked(tuple(run), job.out)


def test_a_request_that_fails_goes_to_the_errors_and_no_resume_does_it_again(
    failing: Asked, zeroinf: Zeroinf, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, seen, report = RequestFeed.done, list[str](), failing.out.parent / "report.json"

    def stopping(self: RequestFeed, row: Any) -> None:
        if len(seen) == 3:
            raise interrupted(15)
        seen.append(row.finish_reason)
        done(self, row)

    with monkeypatch.context() as patch:
        patch.setattr(RequestFeed, "done", stopping)
        assert zeroinf(*failing.run)[0] == 143
    assert seen.count("error") == 2, seen
    told = CliRunner().invoke(cli, ["status", str(failing.out)], catch_exceptions=False).stdout
    assert told.startswith("stopped: 1 done, 3 failed, 1 left")
    code, said = zeroinf(*failing.run, "--resume", "--report", str(report))
    assert code == 5
    assert "error: 1 of 5 requests were refused, 2 failed\n\nhint: see " in said
    assert "failed: line 2: after 0 tokens the model's scores were not numbers; float16 overflows" in said
    assert {key: json.loads(report.read_text())[key] for key in ("requests", "failed", "refused")} == {
        "requests": 1, "failed": 0, "refused": 1,
    }  # fmt: skip
    results, errors = failing.out.read_bytes(), errors_path(failing.out).read_bytes()
    assert [(line["id"], line["finish_reason"]) for line in read_jsonl(failing.out)] == [
        ("good", "length"), ("last", "length"),
    ]  # fmt: skip
    assert [(line["line"], line["id"]) for line in read_jsonl(errors_path(failing.out))] == [
        (2, "broken"), (3, "hot"), (4, "too"),
    ]  # fmt: skip
    errors_path(failing.out).unlink()
    monkeypatch.setattr(loaded, "load_engine", lambda *args: pytest.fail("weights are being loaded"))
    report.unlink()
    code, said = zeroinf(*failing.run, "--resume", "--report", str(report))
    assert code == 5
    assert f"no report in {report}: nothing was run" in said
    assert not report.exists()
    assert (failing.out.read_bytes(), errors_path(failing.out).read_bytes()) == (results, errors)


@pytest.mark.parametrize("engine", ["stream", "resident"])
def test_a_prompt_that_fails_is_told_beside_the_pairs_and_one_cause_for_all_is_told_once(
    engine: str, failing: Asked
) -> None:
    run = ("run", "-m", failing.run[2], "--max-new-tokens", "2", "--engine", engine)
    some = CliRunner().invoke(cli, [*run, "--prompt", "one", "--prompt", "~", "--prompt", "three", "-b", "2"])
    assert [line for line in some.stdout.splitlines() if line.startswith("in=")] == ["in=one", "in=three"]
    assert "failed: request request-2: after 0 tokens" in some.stderr
    assert "1 of 3 requests failed" in str(some.exception)
    none = CliRunner().invoke(cli, [*run, *(("--prompt", "~") * 3)])
    assert none.stdout == ""
    assert none.stderr.count("not numbers") == 0
    assert isinstance(none.exception, RequestsFailedError)
    assert none.exception.message == "all 3 requests that ran failed: the model's scores were not numbers"


def test_from_python_a_failed_prompt_is_an_error_of_its_result_or_of_the_pipeline(failing: Asked) -> None:
    found = generate(failing.run[2], ["one", "~"], max_new_tokens=2)
    assert [(one.finish_reason, one.completion == "") for one in found] == [("length", False), ("error", True)]
    with (
        pipeline(failing.run[2], max_prompt_tokens=8, max_new_tokens=2, batch_size=2) as pipe,
        pytest.raises(RequestsFailedError, match="1 of 2 prompts failed; prompt 1: after 0 tokens"),
    ):
        pipe(["one", "~"])


def test_a_text_for_which_scores_are_not_numbers_has_no_perplexity(failing: Asked, zeroinf: Zeroinf) -> None:
    text = failing.out.parent / "text.txt"
    text.write_text("All is well until ~ comes.")
    code, said = zeroinf("eval", "-m", failing.run[2], "--text", str(text), "--window", "8")
    assert code == 1
    assert "error: the model's scores were not numbers, in window 3 of 4" in said


# Files


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_every_file_of_a_run_has_the_users_umask(umask: int, mode: int, bad: Asked, zeroinf: Zeroinf) -> None:
    report = bad.out.parent / "report.json"
    before = os.umask(umask)
    try:
        assert zeroinf(*bad.run, "--report", str(report))[0] == 5
    finally:
        os.umask(before)
    files = [bad.out, errors_path(bad.out), journal_path(bad.out), report]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {mode}
    assert json.loads(report.read_text())["refused"] == 3


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--report", "out.jsonl"), "would replace a file of the job"),
        (("--report", "out.jsonl.journal"), "would replace a file of the job"),
        (("--report", "./in.jsonl"), "would replace a file of the job"),
        (("-o", "in.jsonl", "--overwrite"), "would replace the input"),
    ],
)
def test_no_file_of_a_job_replaces_another(
    more: tuple[str, ...], words: str, job: Asked, zeroinf: Zeroinf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(job.out.parent)
    before = Path("in.jsonl").read_bytes()
    run = list(job.run)
    if more[0] == "-o":
        where = run.index("-o")
        del run[where : where + 2]
    code, said = zeroinf(*run, *more)
    assert code == 2
    assert words in said
    assert Path("in.jsonl").read_bytes() == before
