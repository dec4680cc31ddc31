"""A whole job without torch: reading, queue, journal, export and shutdown are real, only tokens are made up."""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from zeroinf.distributed.control import Control
from zeroinf.distributed.world import World
from zeroinf.errors import ZeroinfError
from zeroinf.generation.row import Row, Sampling
from zeroinf.jobs import journal
from zeroinf.jobs.journal_output import JournalOutput
from zeroinf.jobs.output import Job
from zeroinf.jobs.readers import read_requests
from zeroinf.jobs.work_list import WorkList
from zeroinf.runs import request_feed
from zeroinf.runs.interrupts import Interrupts, interrupted
from zeroinf.runs.request_feed import Output, RequestFeed
from zeroinf.runs.shutdown import Shutdown
from zeroinf.service.observer import Observer, Progress
from zeroinf.service.requests import Work

ROWS = 3


pause = time.sleep
"""What a pass does that takes long."""


def hurry() -> None:
    """Sync as often as can be, so that every write and every fsync of a long job is in a short one. For a child."""
    journal._SYNC_EVERY_S, journal._SYNC_SHARE = 0.0, float("inf")
    request_feed._TELL_EVERY_S = 0.0


def entries(count: int) -> list[str]:
    """Lines of input: lengths differ, so that results come out of order, and some lines are bad."""
    good = [{"id": f"r{i}", "prompt": f"Grüße {i} \U0001f642", "max_tokens": 1 + i * 7 % 5} for i in range(count)]
    lines = [json.dumps(entry, ensure_ascii=False) for entry in good]
    return [*lines[:2], '{"prompt": "cut off', *lines[2:], '{"prompt": "x", "max_tokens": -1}']


class Ear(Observer):
    """An observer that passes on how many results were reported as done, and what was said."""

    def __init__(self, reported: Callable[[int], None] = lambda count: None) -> None:
        self._reported = reported
        self.said: list[str] = []

    def progress(self, progress: Progress) -> None:
        self._reported(progress.rows_done)

    def note(self, text: str) -> None:
        self.said.append(text)

    failed = note


def read_job(lines: Sequence[str]) -> Job:
    """The requests in `lines`, with bytes for tokens."""
    source = io.BytesIO("".join(line + "\n" for line in lines).encode())
    requests, refusals = read_requests((), source, Sampling(max_new_tokens=4), name="in.jsonl")
    work = tuple(
        Work(
            index=r.index,
            line=r.line,
            id=r.id,
            text=r.prompt,
            prompt=tuple((r.prompt or "").encode()),
            sampling=r.sampling,
        )
        for r in requests
    )
    return Job(
        work=WorkList.of(work), refusals=tuple(refusals), fingerprint={"model": "fake", "prompts": str(len(lines))}
    )


def next_token(row: Row) -> int:
    """A token that depends on the prompt and on all tokens before it, and on nothing else."""
    return hashlib.blake2b(bytes(row.prompt) + bytes(row.generated), digest_size=1).digest()[0]


def decode(tokens: Sequence[int]) -> str:
    return " ".join(f"{token}é" for token in tokens)


def open_stream(job: Job, left: WorkList, control: Control, output: Output | None, observer: Any) -> RequestFeed:
    """The feed of a rank whose engine does nothing."""
    ranks = control.world.size
    anatomy, sizes = SimpleNamespace(is_paged=True, encoder=None), {"batch_size": ROWS, "world_size": ranks}
    plan = SimpleNamespace(**sizes, streams=ranks, static_batches=False, anatomy=anatomy, timing=None)
    prepared: Any = SimpleNamespace(work=left, rows_before=len(job.work) - len(left), plan=plan)
    stats = SimpleNamespace(passes=0, streamed_bytes=0)
    engine: Any = SimpleNamespace(in_step=False, shares_passes=True, stats=lambda: stats)

    def row(prompt: Sequence[int], sampling: Sampling, *, index: int) -> Row:
        return Row(index=index, prompt=prompt, sampling=sampling, decode=decode, piece=None)

    model: Any = SimpleNamespace(engine=engine, part=control.subgroup(1), row=row, codec=None)
    return RequestFeed(prepared, model, control.store, output, observer)


def generate(stream: RequestFeed, interrupts: Interrupts, pause_s: float) -> None:
    """The decode loop, row by row."""
    while rows := stream.take():
        while live := [row for row in rows if not row.finished]:
            if interrupts.requested:
                raise interrupted(interrupts.requested)
            for row in live:
                row.accept(next_token(row), frozenset((0, 1)))
                if row.finished:
                    stream.done(row)
            stream.grew(len(live))
            if pause_s:
                pause(pause_s)


def run_job(lines: Sequence[str], out: Path, ear: Any, *, pause_s: float = 0.0) -> int:
    """One run of the job, as `zeroinf run --resume` would carry it out; its exit code. For a child."""
    hurry()
    job = read_job(lines)
    try:
        with Interrupts() as interrupts:
            output = JournalOutput(out, job, overwrite=False, resume=True, resume_anyway=False)
            held = Output(output)
            shutdown = Shutdown(out, "zeroinf run --resume", held, ear, interrupts)
            try:
                if output.left:
                    output.begin(1)
                    flow = open_stream(job, output.left, Control(World(), "cpu"), held, ear)
                    interrupts.deferred = True
                    try:
                        generate(flow, interrupts, pause_s)
                        flow.gather_all()
                    finally:
                        interrupts.deferred = False
                        flow.gather()
                held.finish()
                shutdown.finished()
            except BaseException as error:
                shutdown.on_error(error)
                raise
    except ZeroinfError as error:
        ear.note(error.message)
        return error.exit_code
    return 0


def in_child(body: Callable[[], int]) -> int:
    """Run `body` in a fork of this process; its process id."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            code = body()
        finally:
            os._exit(code)
    return pid


def exit_code(pid: int) -> int:
    """Wait for a child; negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
