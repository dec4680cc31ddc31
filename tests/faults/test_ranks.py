"""Jobs of several ranks, one of which is killed at a random moment: the journal goes on with any number of ranks."""

from __future__ import annotations

import os
import random
import signal
import threading
from pathlib import Path

import pytest
from fake_job import Ear, generate, hurry, open_stream, read_job
from ranks import on_ranks
from schedules import Bench, Tally, journalled, scratch
from tiers import tiered

from zeroinf.distributed.control import Control
from zeroinf.distributed.watch import PeerWatch
from zeroinf.jobs.journal_output import JournalOutput
from zeroinf.jobs.work_list import WorkList
from zeroinf.runs.interrupts import Interrupts
from zeroinf.runs.request_feed import Output
from zeroinf.runs.shutdown import Shutdown


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(requests=40)


def run_on(control: Control, bench: Bench, out: Path, die_after_s: float | None) -> None:
    """One rank's part of a run; `die_after_s` kills it."""
    hurry()
    job = read_job(bench.lines)
    with Interrupts() as interrupts:
        output = None
        if control.world.is_main:
            output = JournalOutput(out, job, overwrite=False, resume=True, resume_anyway=False)
            output.begin(control.world.size)
        work = (output.left if output is not None else WorkList()).shared(control)
        held = Output(output) if output is not None else None
        shutdown = Shutdown(out, "zeroinf run --resume", held, Ear(), interrupts)
        shutdown.watch = PeerWatch(control, shutdown.on_peer_death) if control.world.size > 1 else None
        if die_after_s is not None:
            threading.Timer(die_after_s, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
        flow = open_stream(job, work, control, held, Ear())
        try:
            generate(flow, interrupts, 0.01)
            flow.gather_all()
        except BaseException as error:
            shutdown.on_error(error)
            raise
        control.all_gather(None)
        if shutdown.watch is not None:
            shutdown.watch.stop()
        if held is not None:
            held.finish()
        control.close()


def ranks_with_one_that_dies(bench: Bench, seed: int) -> Tally:
    """A job on three ranks, then on two, one of which is killed each time, then on one, two or four."""
    chance, tally = random.Random(seed), Tally(schedules=1)
    with scratch() as folder:
        out = folder / "out.jsonl"
        for size in (3, 2):
            victim, after_s = chance.randrange(size), chance.uniform(0.05, 0.25)

            def body(control: Control, victim: int = victim, after_s: float = after_s) -> None:
                run_on(control, bench, out, after_s if control.world.rank == victim else None)

            before = len(journalled(out))
            _, codes = on_ranks(size, body)
            tally.faults += codes[victim] == -signal.SIGKILL
            bench.check(folder, before, tally)
        on_ranks(chance.choice((1, 2, 4)), lambda control: run_on(control, bench, out, None))
        bench.finish(folder, tally)
    return tally


SEEDS = range(4)


@pytest.mark.parametrize("seed", tiered(SEEDS, [int(os.environ["TEST_SEED"]) % len(SEEDS)]))
def test_a_rank_killed_at_a_random_moment_loses_and_doubles_nothing_with_any_number_of_ranks_after(
    seed: int, bench: Bench
) -> None:
    tally = ranks_with_one_that_dies(bench, seed)
    assert tally.faults >= 1
    assert tally.is_clean, tally
