"""The journal itself: cut, flipped or filled with zeros anywhere, on a disk that is full, and who may write it."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import fake_job
import pytest
from fake_job import Ear, exit_code, in_child, read_job, run_job
from hypothesis import given
from hypothesis import strategies as st
from schedules import Bench, Tally, journalled, scratch

from zeroinf.errors import OutputError
from zeroinf.jobs.files import LineFile
from zeroinf.jobs.journal import Journal
from zeroinf.jobs.journal_output import JournalOutput
from zeroinf.jobs.output_files import journal_path
from zeroinf.runs.interrupts import Interrupts
from zeroinf.sizes import count_text

FOREVER_S = 600
"""Longer than a test may take: what waits for it fails."""


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(requests=6)


@pytest.fixture(scope="module")
def whole(bench: Bench) -> bytes:
    """The journal of a finished job."""
    with scratch() as folder:
        assert exit_code(in_child(lambda: run_job(bench.lines, folder / "out.jsonl", Ear()))) == 0
        return journal_path(folder / "out.jsonl").read_bytes()


def left_of(bench: Bench, folder: Path, content: bytes) -> set[int]:
    """What is left to do for a run that finds `content` as its journal, which is sound afterwards."""
    journal_path(folder / "out.jsonl").write_bytes(content)
    output = JournalOutput(
        folder / "out.jsonl", read_job(bench.lines), overwrite=False, resume=True, resume_anyway=False
    )
    output.begin(1)
    output.abandon("only looking")
    again = JournalOutput(
        folder / "out.jsonl", read_job(bench.lines), overwrite=False, resume=True, resume_anyway=False
    )
    assert {work.index for work in again.left} == {work.index for work in output.left}
    again.abandon("only looking")
    return {work.index for work in output.left}


def test_cut_at_every_byte_it_keeps_every_whole_record_and_is_sound_after(bench: Bench, whole: bytes) -> None:
    every = {work.index for work in read_job(bench.lines).work}
    with scratch() as folder:
        for size in range(len(whole)):
            journal_path(folder / "out.jsonl").write_bytes(whole[:size])
            kept = set(journalled(folder / "out.jsonl"))
            assert len(kept) == whole[:size].count(b'{"result"') - (not whole[:size].endswith(b"\n") and b'{"result"' in
                whole[:size].rpartition(b"\n")[2])  # fmt: skip
            assert left_of(bench, folder, whole[:size]) == every - kept


@given(data=st.data())
def test_flipped_zeroed_or_stuffed_anywhere_behind_the_first_line_it_never_yields_a_result_that_was_not_written(
    data: st.DataObject, bench: Bench, whole: bytes
) -> None:
    first = whole.index(b"\n") + 1
    content = bytearray(whole[: data.draw(st.integers(first, len(whole)))])
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(first, len(content)))
        to = data.draw(st.integers(at, min(at + 300, len(content))))
        content[at:to] = data.draw(st.sampled_from((b"", bytes(to - at), b"\xff" * 7, bytes(content[first:to]))))
    with scratch() as folder:
        sound = {r["index"]: r for r in _results(folder, whole)}
        found = _results(folder, bytes(content))
        assert all(sound[result["index"]] == result for result in found)
        every = {work.index for work in read_job(bench.lines).work}
        assert left_of(bench, folder, bytes(content)) == every - {result["index"] for result in found}


def _results(folder: Path, content: bytes) -> list[dict[str, object]]:
    from zeroinf.jobs.journal import read_records

    file = folder / "look"
    file.write_bytes(content)
    return [record["result"] for _, record, _ in read_records(file) if record and "result" in record]


def test_damage_amid_the_journal_costs_its_own_lines_only_and_is_counted(whole: bytes, tmp_path: Path) -> None:
    lines = whole.splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if b'{"result"' in line)
    lines[at] = lines[at].replace(b"completion", b"complexion")
    (tmp_path / "j").write_bytes(b"".join(lines))
    journal = Journal(tmp_path / "j")
    assert (len(journal.results), journal.damaged) == (5, 1)


def test_a_first_line_that_is_damaged_is_refused_and_the_file_left_alone(whole: bytes, tmp_path: Path) -> None:
    content = b"x" + whole[1:]
    (tmp_path / "j").write_bytes(content)
    with pytest.raises(OutputError, match="its first line is damaged"):
        Journal(tmp_path / "j")
    assert (tmp_path / "j").read_bytes() == content


@pytest.mark.parametrize("times", [1, 2])
def test_a_signal_before_the_first_line_is_written_leaves_a_journal_to_go_on_from(bench: Bench, times: int) -> None:
    def struck(file: LineFile, size_bytes: int, cut: Callable[[LineFile, int], None] = LineFile.cut) -> None:
        cut(file, size_bytes)
        os.kill(os.getpid(), signal.SIGTERM)

    def body() -> int:
        LineFile.cut = struck  # type: ignore[method-assign]
        return run_job(bench.lines, folder / "out.jsonl", Ear())

    tally = Tally(schedules=1)
    with scratch() as folder:
        for _ in range(times):
            assert exit_code(in_child(body)) == 128 + signal.SIGTERM
        bench.finish(folder, tally)
    assert tally.is_clean


# Disks that are full


def after_limits(bench: Bench, folder: Path, limits: Iterator[None]) -> Tally:
    """Runs into each limit, then one without."""
    tally = Tally(schedules=1)
    for _ in limits:
        reported = [0]
        reads, writes = os.pipe()

        def body(writes: int = writes) -> int:
            ear = Ear(lambda count: os.write(writes, bytes([count])) and None)
            return run_job(bench.lines, folder / "out.jsonl", ear)

        pid = in_child(body)
        os.close(writes)
        with os.fdopen(reads, "rb") as pipe:
            reported = [*reported, *pipe.read()]
        code = exit_code(pid)
        assert code in (0, 2), "a clean stop"
        tally.faults += code == 2
        bench.check(folder, max(reported), tally)
    bench.finish(folder, tally)
    return tally


def test_a_limit_of_file_size_ends_each_run_cleanly_and_the_job_gets_done(bench: Bench, whole: bytes) -> None:
    def limits() -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            for size in range(0, len(whole) + 200, 150):
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
                yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    with scratch() as folder:
        tally = after_limits(bench, folder, limits())
        assert tally.faults > 5
        assert tally.is_clean, tally


@contextmanager
def small_disk(folder: Path, pages: int) -> Iterator[None]:
    libc = ctypes.CDLL(None, use_errno=True)
    size = f"size={pages * resource.getpagesize()}".encode()
    if libc.mount(b"tmpfs", bytes(folder), b"tmpfs", 0, size):
        pytest.skip(f"mounting is not permitted: {os.strerror(ctypes.get_errno())}")
    try:
        yield
    finally:
        libc.umount(bytes(folder))


def test_a_disk_that_fills_up_ends_the_run_cleanly_and_with_room_again_the_job_gets_done(tmp_path: Path) -> None:
    bench = Bench(requests=60)
    faults = 0
    for pages in range(1, 6):
        disk = tmp_path / str(pages)
        disk.mkdir()
        with small_disk(disk, pages):

            def limits(disk: Path = disk) -> Iterator[None]:
                yield
                subprocess.run(["mount", "-o", "remount,size=1m", str(disk)], check=True)

            tally = after_limits(bench, disk, limits())
        faults += tally.faults
        assert tally.is_clean, tally
    assert faults >= 3


def test_who_runs_into_a_full_disk_is_told_what_is_saved_and_how_to_go_on(bench: Bench, whole: bytes) -> None:
    with scratch() as folder:
        reads, writes = os.pipe()

        def body() -> int:
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) * 2 // 3, len(whole)))
            ear = Ear()
            code = run_job(bench.lines, folder / "out.jsonl", ear)
            os.write(writes, "\n".join(ear.said).encode())
            return code

        pid = in_child(body)
        os.close(writes)
        with os.fdopen(reads) as pipe:
            saved, error = pipe.read().splitlines()
        assert exit_code(pid) == 2
        journal, count = journal_path(folder / "out.jsonl"), len(journalled(folder / "out.jsonl"))
        assert 0 < count < 6
        words = count_text(count, "finished result is", "finished results are")
        there = count_text(count, "result is", "results are")
        assert saved.endswith(f"{words} saved in {journal}; to go on: zeroinf run --resume")
        assert error == f"cannot write {journal}: File too large; {there} saved there"


def test_a_folder_that_became_read_only_is_a_clean_stop_before_the_work(bench: Bench, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    with small_disk(disk, 64):
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert exit_code(in_child(lambda: run_job(bench.lines, disk / "out.jsonl", Ear()))) == 2


# Who may write


def test_of_two_runs_at_once_one_is_refused_and_the_other_is_not_disturbed(bench: Bench) -> None:
    with scratch() as folder:
        out = folder / "out.jsonl"
        first = in_child(lambda: run_job(bench.lines, out, Ear(), pause_s=0.3))
        while not journalled(out):
            time.sleep(0.01)
        others = [in_child(lambda: run_job(bench.lines, out, Ear())) for _ in range(2)]
        assert [exit_code(pid) for pid in (*others, first)] == [2, 2, 0]
        tally = Tally()
        bench.finish(folder, tally)
        assert tally.is_clean, tally


# Signals


def test_a_pass_that_takes_long_is_dropped_within_seconds_of_the_first_signal_and_what_is_done_is_saved(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zeroinf.runs.interrupts.GRACE_S", 0.3)
    with scratch() as folder:
        out = folder / "out.jsonl"
        pid = in_child(lambda: run_job(bench.lines, out, Ear(), pause_s=FOREVER_S))
        while not journalled(out):
            time.sleep(0.01)
        os.kill(pid, signal.SIGTERM)
        assert exit_code(pid) == 143
        assert b'"ended": "stopped by SIGTERM"' in journal_path(out).read_bytes()
        tally = Tally()
        bench.finish(folder, tally)
        assert tally.is_clean, tally


def deaf_sleep(seconds: float) -> None:
    libc, left = ctypes.CDLL(None), round(seconds)
    while left:  # a C call that goes on where a signal broke it
        left = libc.sleep(left)


def signal_until_it_ends(pid: int, every_s: float) -> None:
    """Signals that come sooner than the process learns of the one before are one: send another."""
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(every_s)
        os.kill(pid, signal.SIGTERM)


def test_a_second_signal_ends_the_process_at_once_even_in_a_call_that_hears_no_signals_and_the_job_goes_on(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_job, "pause", deaf_sleep)
    with scratch() as folder:
        out = folder / "out.jsonl"
        pid = in_child(lambda: run_job(bench.lines, out, Ear(), pause_s=FOREVER_S))
        while not journalled(out):
            time.sleep(0.01)
        os.kill(pid, signal.SIGINT)
        signal_until_it_ends(pid, 0.8)
        assert exit_code(pid) == 143
        assert b'"ended"' not in journal_path(out).read_bytes(), "at once"
        tally = Tally()
        bench.finish(folder, tally)
        assert tally.is_clean, tally


@pytest.mark.parametrize(
    ("grace_s", "second_after_s"),
    [(0.2, None), (FOREVER_S, 1.0), (3.0, 4.0)],
    ids=["one signal", "a second one", "a second one while the last resort waits for the disk"],
)
def test_a_disk_that_hangs_keeps_nobody_who_stops_the_run_and_they_are_told_what_is_saved(
    grace_s: float, second_after_s: float | None, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zeroinf.runs.interrupts.GRACE_S", grace_s)
    sync, syncs = LineFile.sync, []

    def hanging(file: LineFile) -> None:
        syncs.append(None)
        if len(syncs) > 3:  # the journal's beginning, and some results
            os.write(writes, b"hangs\n")
            deaf_sleep(FOREVER_S)
        sync(file)

    monkeypatch.setattr(LineFile, "sync", hanging)
    reads, writes = os.pipe()
    ear = Ear()
    ear.note = ear.failed = lambda text: os.write(writes, f"{text}\n".encode()) and None  # type: ignore[method-assign]
    with scratch() as folder, os.fdopen(reads) as said:
        out = folder / "out.jsonl"
        pid = in_child(lambda: run_job(bench.lines, out, ear, pause_s=0.01))
        os.close(writes)
        while said.readline() != "hangs\n":
            pass
        os.kill(pid, signal.SIGINT)
        if second_after_s is not None:
            signal_until_it_ends(pid, second_after_s)
        assert exit_code(pid) == (130 if second_after_s is None else 143)
        told = said.read()
        assert "stopped by SIG" in told
        assert re.search(
            rf"\d finished results, or more, are saved in {journal_path(out)}; to go on: zeroinf run", told
        )
        monkeypatch.undo()
        tally = Tally()
        bench.finish(folder, tally)
        assert tally.is_clean, tally


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_a_terminal_that_closes_and_a_batch_queue_stop_a_run_in_order_and_it_goes_on(number: int, bench: Bench) -> None:
    with scratch() as folder:
        out = folder / "out.jsonl"
        pid = in_child(lambda: run_job(bench.lines, out, Ear(), pause_s=0.1))
        while not journalled(out):
            time.sleep(0.01)
        os.kill(pid, number)
        assert exit_code(pid) == 128 + number
        assert f'"ended": "stopped by {signal.Signals(number).name}"'.encode() in journal_path(out).read_bytes()
        tally = Tally()
        bench.finish(folder, tally)
        assert tally.is_clean, tally


def test_a_run_that_nohup_started_outlives_its_terminal(bench: Bench) -> None:
    def body() -> int:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        return run_job(bench.lines, folder / "out.jsonl", Ear(), pause_s=0.02)

    with scratch() as folder:
        pid = in_child(body)
        while not journalled(folder / "out.jsonl"):
            time.sleep(0.01)
        os.kill(pid, signal.SIGHUP)
        assert exit_code(pid) == 0


def test_signals_that_come_together_are_one() -> None:
    def body() -> int:
        with Interrupts() as interrupts:
            interrupts.deferred = True
            for number in (signal.SIGINT, signal.SIGTERM):
                os.kill(os.getpid(), number)
            time.sleep(0.7)
            return interrupts.requested

    assert exit_code(in_child(body)) == signal.SIGINT


def test_what_is_held_is_the_journal_not_a_file_beside_it(bench: Bench) -> None:
    """Nothing is left behind that could be stale."""
    with scratch() as folder:
        pid = in_child(lambda: run_job(bench.lines, folder / "out.jsonl", Ear(), pause_s=0.05))
        while not journalled(folder / "out.jsonl"):
            time.sleep(0.01)
        os.kill(pid, signal.SIGKILL)
        exit_code(pid)
        assert {path.name for path in folder.iterdir()} == {"out.jsonl.journal", "out.jsonl.errors.jsonl"}
        tally = Tally()
        bench.finish(folder, tally)
        assert tally.is_clean, tally
