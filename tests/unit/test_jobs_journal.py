"""When the journal makes results durable, and what `zeroinf status` reads from it."""

from __future__ import annotations

import json
import os
import random
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from observers import Notes
from test_jobs_output import begun, job, result

from zeroinf.cli.main import cli
from zeroinf.errors import UsageError
from zeroinf.jobs import journal
from zeroinf.jobs.journal import Journal
from zeroinf.runs.interrupts import Interrupts, interrupted
from zeroinf.runs.request_feed import Output
from zeroinf.runs.shutdown import Shutdown
from zeroinf.service.observer import Progress, tokens_left


class Disk:
    """A clock, and a disk that takes `sync_s` to make anything durable."""

    def __init__(self, sync_s: float, patch: pytest.MonkeyPatch) -> None:
        self.now, self.sync_s, self.syncs = 1000.0, sync_s, 0
        patch.setattr(journal.time, "monotonic", lambda: self.now)
        patch.setattr(os, "fsync", self._fsync)

    def _fsync(self, descriptor: int) -> None:
        self.now += self.sync_s
        self.syncs += 1


@pytest.mark.parametrize("sync_s", [0.0001, 0.003, 0.03, 1.0])
def test_making_results_durable_takes_at_most_a_hundredth_of_the_time(
    sync_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(sync_s, monkeypatch)
    own = Journal(tmp_path / "j")
    own.start({"fingerprint": {}})
    started, before = disk.now, disk.syncs
    for index in range(10_000):
        own.add(result(index), "")
        disk.now += 0.1
        own.sync_if_due()
    syncs = disk.syncs - before
    assert syncs >= 5
    assert syncs * sync_s <= 0.01 * (disk.now - started)
    assert own.durable >= 10_000 - 100 * max(1.0, sync_s) / 0.1 - 1, "and what is not durable is no more than that"


def test_nothing_is_synced_where_nothing_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(0.003, monkeypatch)
    own = Journal(tmp_path / "j")
    own.start({"fingerprint": {}})
    before = disk.syncs
    for _ in range(100):
        disk.now += 1
        own.sync_if_due()
    assert disk.syncs == before


def status(path: Path, *flags: str) -> str:
    done = CliRunner().invoke(cli, ["status", str(path), *flags], catch_exceptions=False)
    return done.stdout


def progress(tokens: int, *, left: float, elapsed_s: float = 2.0) -> Progress:
    return Progress(rows_done=0, rows=4, tokens=tokens, tokens_left=left, elapsed_s=elapsed_s, streamed_bytes=0)


def test_status_tells_tokens_and_time_left_before_the_first_row_is_finished(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    output = begun(out, job(4))
    assert status(out) == "running: 0 done, 0 failed, 4 left\n"
    output.progress(progress(10, left=190))
    assert status(out) == "running: 0 done, 0 failed, 4 left, 10 tokens, 5.0 tokens/s, 0:38 left\n"
    output.progress(progress(20, left=180))
    assert "10 tokens" in status(out), "every few seconds is enough"
    output.progress(progress(200, left=0, elapsed_s=40))
    assert status(out) == "running: 0 done, 0 failed, 4 left, 200 tokens, 5.0 tokens/s, 0:00 left\n"
    output.add(result(0))
    output.abandon("the disk is on fire")
    found = json.loads(status(out, "--json"))
    assert (found["tokens_per_second"], found["left_s"]) == (5.0, None), "a stopped job has no end"


def test_the_time_left_is_the_plans_after_the_first_pass_and_the_measured_one_later(tmp_path: Path) -> None:
    """The first pass of a run takes as long as a hundred others: loading of kernels, and the first prompts."""
    output = begun(tmp_path / "out.jsonl", job(4))
    early = replace(progress(8, left=11992, elapsed_s=6.0), expected_s=90.0)
    assert early.left_s == pytest.approx(90, rel=0.3)
    output.progress(early)
    assert json.loads(status(tmp_path / "out.jsonl", "--json"))["left_s"] == early.left_s
    late = replace(progress(6000, left=6000, elapsed_s=1000.0), expected_s=90.0)
    assert late.left_s == pytest.approx(1000, rel=0.15)
    assert replace(progress(12000, left=0, elapsed_s=1000.0), expected_s=90.0).left_s == 0


@pytest.mark.parametrize(("done", "generated"), [(0, 0), (0, 40), (1, 40)])
def test_who_stops_a_run_in_its_first_wave_is_told_what_is_saved_and_what_is_not(
    done: int, generated: int, tmp_path: Path
) -> None:
    out, notes = tmp_path / "out.jsonl", Notes()
    output = Output(begun(out, job(4)))
    for index in range(done):
        output.add(result(index))
    output.progress(progress(output.completion_tokens + generated, left=100))
    with Interrupts() as interrupts:
        shutdown = Shutdown(out, "zeroinf run --resume", output, notes, interrupts)
        interrupts.deferred = True
        os.kill(os.getpid(), signal.SIGUSR1)
        assert interrupts.requested == signal.SIGUSR1
        shutdown.on_error(interrupted(signal.SIGUSR1))
        shutdown.finished()
    saved = (
        f"1 finished result is saved in {out}.journal"
        if done
        else "no request has finished, so there is nothing to save"
    )
    lost = "40 tokens of unfinished completions are lost; " if generated else ""
    assert notes.notes == [f"{lost}{saved}; to go on: zeroinf run --resume"]


def test_rows_that_end_early_are_expected_to_go_on_ending_as_they_did() -> None:
    """Rows side by side, each with a tenth of a chance to end after each token, in the middle of the job."""
    draw = random.Random(0)
    lengths = [next((n for n in range(1, 40) if draw.random() < 0.1), 40) for _ in range(2000)]
    for after in (3, 10, 20):
        done = [length for length in lengths if length <= after]
        tokens = sum(min(length, after) for length in lengths)
        rows = len(lengths) - len(done)
        estimate = tokens_left(rows, rows * (40 - after), tokens, len(done))
        assert estimate == pytest.approx(sum(lengths) - tokens, rel=0.1)
    assert tokens_left(rows=3, most=30, tokens=0, ended_early=0) == 30
    assert tokens_left(rows=0, most=0, tokens=9, ended_early=2) == 0


def test_status_says_what_is_done_and_left_while_a_job_runs_when_it_stopped_and_when_it_is_finished(
    tmp_path: Path,
) -> None:
    out = tmp_path / "out.jsonl"
    output = begun(out, job(4, refused=[2]))
    output.add(result(3))
    assert status(out).startswith("running: 1 done, 1 failed, 2 left")
    output.abandon("the disk is on fire")
    assert status(out).startswith("stopped: 1 done, 1 failed, 2 left")
    assert status(out).endswith("last error: the disk is on fire\n")
    output = begun(out, job(4, refused=[2]), resume=True)
    for index in (0, 1):
        output.add(result(index))
    output.progress(progress(4, left=0))
    output.finish()
    assert status(out).startswith("finished: 3 done, 1 failed, 0 left, 4 tokens, 2.0 tokens/s\n")
    found = json.loads(status(out.with_name("out.jsonl.journal"), "--json"))
    assert {name: found[name] for name in ("schema", "state", "done", "failed", "left", "tokens", "runs")} == {
        "schema": 1, "state": "finished", "done": 3, "failed": 1, "left": 0, "tokens": 4, "runs": 2,
    }  # fmt: skip


def test_status_does_not_disturb_a_run_and_watch_follows_it_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.jsonl"
    output = begun(out, job(2))
    steps = iter((lambda: output.add(result(1)), lambda: output.add(result(0)), output.finish))
    monkeypatch.setattr("zeroinf.cli.status.time.sleep", lambda seconds: next(steps)())
    told = [line.partition(",")[0] for line in status(out, "--watch").splitlines()]
    assert told == ["running: 0 done", "running: 1 done", "running: 2 done", "finished: 2 done"]


def test_watch_ends_with_a_run_that_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.jsonl"
    output = begun(out, job(2))
    output.add(result(0))
    monkeypatch.setattr("zeroinf.cli.status.time.sleep", lambda seconds: output.abandon("the disk is on fire"))
    states = [json.loads(line)["state"] for line in status(out, "--watch", "--json").splitlines()]
    assert states == ["running", "stopped"]


def test_status_prints_the_results_that_have_come_while_others_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.jsonl"
    output = begun(out, job(4))
    for index in (2, 0):
        output.add(result(index))
    output.add(replace(result(3), finish_reason="error"))
    lines = [result(index).to_line() for index in (2, 0)]
    assert status(out, "--tail").splitlines() == lines
    following = iter([lambda: output.add(result(1)), lambda: output.abandon("the disk is on fire")])
    monkeypatch.setattr("zeroinf.cli.status.time.sleep", lambda seconds: next(following)())
    assert status(out, "--tail", "--watch").splitlines() == [*lines, result(1).to_line()]
    with pytest.raises(UsageError, match="--tail and --json contradict"):
        status(out, "--tail", "--json")


@pytest.mark.parametrize("content", [None, b"what I did on my holidays\n"])
def test_status_of_what_is_no_job_says_so(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "out.jsonl.journal").write_bytes(content)
    done = CliRunner().invoke(cli, ["status", str(tmp_path / "out.jsonl")])
    assert done.exception is not None
    assert "out.jsonl.journal" in str(done.exception)
    assert getattr(done.exception, "exit_code", None) == 2
