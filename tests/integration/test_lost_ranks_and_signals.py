"""Ranks that die, Ctrl-C and SIGTERM: the job ends at once, says why, and keeps what is finished."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from launching import (
    Launcher,
    Process,
    changed,
    has_results,
    journalled,
    rank_processes,
    run_zeroinf,
    started,
    wait_until,
)
from tiers import full

from zeroinf.jobs.output_files import journal_path


@pytest.fixture(scope="session")
def model(small_checkpoint: Callable[[str], Path]) -> Path:
    return small_checkpoint("llama")


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """More work than any test waits for."""
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"prompt {i}\n" for i in range(10_000)))
    return path


def arguments(model: Path, prompts: Path, out: Path, *more: str, engine: str = "zero") -> list[str]:
    return [
        "-m",
        str(model),
        "-i",
        str(prompts),
        "-o",
        str(out),
        "-b",
        "2",
        "--max-new-tokens",
        "12",
        "--engine",
        engine,
        *(() if "--offload" in more else ("--offload", "cpu")),
        *more,
    ]


def ended(process: Process) -> str:
    """Standard error of a process that is about to end, with far more work left than it could do meanwhile."""
    return process.communicate(timeout=120)[1]


def check_saved(out: Path, err: str) -> None:
    """Finished results are in the journal, each once, and the user is told so, once, with what goes on from there."""
    journal = journal_path(out)
    saved = [line["id"] for line in journalled(journal)]
    assert saved
    assert len(set(saved)) == len(saved)
    words = "1 finished result is" if len(saved) == 1 else f"{len(saved)} finished results are"
    assert err.count(f"{words} saved in {journal}; to go on: zeroinf run ") == 1
    assert not out.exists()
    assert "GLHF" not in err, "what gloo says of a lost peer"


def gone(processes: list[int]) -> bool:
    def lives(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    return not any(map(lives, processes))


@pytest.mark.parametrize(("launcher", "victim", "engine"), [full("num-gpus", 0, "zero"), ("torchrun", 1, "stream")])
def test_a_killed_rank_takes_the_job_down_and_is_named(
    launcher: Launcher, victim: int, engine: str, model: Path, many: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    with started(arguments(model, many, out, engine=engine), ranks=2, launcher=launcher) as process:
        wait_until(lambda: has_results(tmp_path / "out.jsonl", 2), process)
        ranks = rank_processes(process)
        assert sorted(ranks) == [0, 1]
        ranks[victim].send_signal(signal.SIGKILL)
        err = ended(process)
        assert process.returncode not in (0, None)
        assert f"rank {victim} (process {ranks[victim].pid}) died" in err
        assert "killed" in err
        assert gone([rank.pid for rank in ranks.values()])
    if victim == 0:
        assert has_results(tmp_path / "out.jsonl", 2), "what rank 0 had written stays"
        assert f"saved in {out}.journal; to go on: zeroinf run " in err
    else:
        check_saved(out, err)


@pytest.mark.parametrize(
    ("number", "code", "ranks"), [(signal.SIGINT, 130, 1), full(signal.SIGTERM, 143, 1), full(signal.SIGTERM, 143, 2)]
)
def test_a_signal_ends_the_run_in_order(
    number: int, code: int, ranks: int, model: Path, many: Path, tmp_path: Path
) -> None:
    out, nvme = tmp_path / "out.jsonl", tmp_path / "nvme"
    nvme.mkdir()
    more = ("--offload", "nvme", "--nvme-path", str(nvme))
    with started(
        arguments(model, many, out, *more), ranks=ranks, launcher="none" if ranks == 1 else "num-gpus"
    ) as process:  # fmt: skip
        wait_until(lambda: has_results(tmp_path / "out.jsonl", 2), process)
        assert len(list(nvme.glob("zeroinf-swap-*"))) == ranks
        process.send_signal(number)
        err = ended(process)
    assert process.returncode == code, err
    assert f"stopped by {signal.Signals(number).name}" in err
    check_saved(out, err)
    assert not list(nvme.iterdir())


def test_ctrl_c_on_a_terminal_reaches_every_process_and_ends_the_run_in_order(
    model: Path, many: Path, tmp_path: Path
) -> None:
    """A terminal signals the whole foreground group, launcher and all, not one process."""
    out = tmp_path / "out.jsonl"
    with started(arguments(model, many, out), ranks=2, launcher="num-gpus", own_group=True) as process:
        wait_until(lambda: has_results(tmp_path / "out.jsonl", 2), process)
        os.killpg(process.pid, signal.SIGINT)
        err = ended(process)
    assert process.returncode == 130, err
    check_saved(out, err)


@pytest.mark.parametrize("engine", ["zero", "accelerate"])
def test_what_a_killed_run_left_on_disk_goes_with_the_next_one(
    engine: str, model: Path, many: Path, tmp_path: Path
) -> None:
    nvme = tmp_path / "nvme"
    nvme.mkdir()
    more = ("--offload", "nvme", "--nvme-path", str(nvme))
    with started(arguments(model, many, tmp_path / "killed.jsonl", *more, engine=engine)) as process:
        wait_until(lambda: has_results(tmp_path / "killed.jsonl", 1), process)
        process.kill()
        process.wait()
    assert len(list(nvme.glob("zeroinf-swap-*"))) == 1
    done = run_zeroinf(["-m", str(model), "--prompt", "next", "--max-new-tokens", "1", "--engine", engine, *more])
    assert done.code == 0, done.err
    assert not list(nvme.iterdir())


def failing_on_rank(rank: int, tmp_path: Path, where: str, *, killed: bool = False) -> dict[str, str]:
    """An environment in which `where` (module:Class.method) raises on one rank, or kills it."""
    module, _, path = where.partition(":")
    end = "os.kill(os.getpid(), 9)" if killed else 'raise RuntimeError("the disk is on fire")'
    code = f"""
import os

def fail(*args, **kwargs):
    {end}

if rank == "{rank}":
    own.{path} = fail
"""
    return changed(tmp_path, {module: code})


@pytest.mark.parametrize("rank", [0, full(1)])
def test_a_rank_that_fails_while_generating_names_its_cause(rank: int, model: Path, many: Path, tmp_path: Path) -> None:
    env = failing_on_rank(rank, tmp_path, "zeroinf.runs.request_feed:RequestFeed.done")
    done = run_zeroinf(
        arguments(model, many, tmp_path / "out.jsonl"), ranks=2, launcher="num-gpus", env=env
    )  # fmt: skip
    assert done.code not in (0, 130, 143)
    assert "the disk is on fire" in done.err
    if rank == 0:
        assert "died" not in done.err, "rank 0 speaks for itself, and the other leaves in silence"
    else:
        assert re.search(r"error: rank 1 \(process \d+\) died: the disk is on fire", done.err)


def test_a_rank_that_fails_while_loading_names_its_cause(model: Path, many: Path, tmp_path: Path) -> None:
    env = failing_on_rank(1, tmp_path, "zeroinf.engines.zero.engine:ZeroEngine.__init__")
    done = run_zeroinf(
        arguments(model, many, tmp_path / "out.jsonl"), ranks=2, launcher="num-gpus", env=env
    )  # fmt: skip
    assert done.code not in (0, 130, 143)
    assert re.search(r"error: rank 1 \(process \d+\) died: the disk is on fire", done.err)


def test_a_rank_that_is_killed_while_loading_is_named(model: Path, many: Path, tmp_path: Path) -> None:
    env = failing_on_rank(1, tmp_path, "zeroinf.engines.stream.engine:StreamEngine.__init__", killed=True)
    done = run_zeroinf(
        arguments(model, many, tmp_path / "out.jsonl", engine="stream"), ranks=2, launcher="num-gpus", env=env
    )  # fmt: skip
    assert done.code not in (0, None)
    assert re.search(r"error: rank 1 \(process \d+\) died", done.err) and "killed" in done.err


def test_ranks_that_wait_for_each_other_end_with_who_waits_for_whom_and_what_is_saved(
    model: Path, tmp_path: Path
) -> None:
    elsewhere = """
import time

def never(stream):
    with stream._place.waiting("a word that nobody says", range(2)):
        time.sleep(600)

if rank == "1":
    own.RequestFeed.gather_all = never
"""
    soon = "own._TICK_S, own._REPORT_AFTER_S, own._DEADLOCK_AFTER_S, own._GRACE_S = 0.1, 0.3, 1.0, 1.0"
    env = changed(tmp_path, {"zeroinf.runs.request_feed": elsewhere, "zeroinf.distributed.waits": soon})
    (tmp_path / "few.txt").write_text("one\ntwo\nthree\nfour\n")
    out = tmp_path / "out.jsonl"
    done = run_zeroinf(
        arguments(model, tmp_path / "few.txt", out, engine="stream"), ranks=2, launcher="num-gpus", env=env
    )
    assert done.code == 1, done.err
    assert done.err.count("error: ranks wait for each other, and none will come: ") == 1
    assert "for rank 1, which waits at a word that nobody says" in done.err
    assert "died" not in done.err
    assert "lost the connection" not in done.err
    check_saved(out, done.err)
