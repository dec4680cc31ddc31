"""Schedules of crashes and failures, each run and checked: what was reported is kept, and the end is as if nothing was.

A schedule is a row of runs of one job, each with a fault at one of its events, and then a run without. After each run
the journal must hold at least as many results as were reported as done; after the last one the output must be, byte
for byte, that of a run without faults.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from crashes import CRASHES, DIED, FAILURES, Failure, Fault, Faults
from fake_job import Ear, entries, exit_code, in_child, run_job

from zeroinf.jobs.journal import read_records
from zeroinf.jobs.output_files import errors_path, journal_path

_MESSAGE = struct.Struct("cq")
_REPORTED, _EVENTS = b"r", b"e"


class Step(NamedTuple):
    """One run: what happens, and at which of its events, counted from 1."""

    fault: Fault | Failure
    at: int
    seed: int = 0


@dataclass(kw_only=True)
class Tally:
    """What came of schedules."""

    schedules: int = 0
    faults: int = 0
    """Runs that a fault ended."""
    lost: int = 0
    """Results reported as done that were not there after the run."""
    duplicated: int = 0
    """Results that were in a journal, or in an output, more than once."""
    different: int = 0
    """Schedules whose output was not that of a run without faults."""

    def __add__(self, other: Tally) -> Tally:
        return Tally(**{name: getattr(self, name) + getattr(other, name) for name in vars(self)})

    @property
    def is_clean(self) -> bool:
        return self.lost == self.duplicated == self.different == 0


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder in memory where there is one: what is tried is the order of events, not the disk."""
    where = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = Path(tempfile.mkdtemp(dir=where))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Bench:
    """A job to break. Its output without faults is known."""

    def __init__(self, requests: int = 10) -> None:
        self.lines = entries(requests)
        with scratch() as folder:
            code, _, self.events = self._run(folder, Step("kill", 0))
            assert code == 0
            self.expected = _contents(folder / "out.jsonl")
            assert self.expected[0].count(b"\n") == requests

    def run(self, steps: Sequence[Step]) -> Tally:
        """One schedule."""
        tally = Tally(schedules=1)
        with scratch() as folder:
            reported = 0
            for step in steps:
                code, now, _ = self._run(folder, step)
                reported = max(reported, now)
                assert code in ((DIED, 0) if step.fault in CRASHES else (0, 2)), (step, code)
                tally.faults += code != 0
                self.check(folder, reported, tally)
            self.finish(folder, tally)
        return tally

    def check(self, folder: Path, reported: int, tally: Tally) -> None:
        """Whether what was reported is in the journal, once."""
        counts = journalled(folder / "out.jsonl")
        tally.lost += max(0, reported - len(counts))
        tally.duplicated += sum(counts.values()) - len(counts)

    def finish(self, folder: Path, tally: Tally) -> None:
        """A last run, without faults, and what came of it all."""
        folder.mkdir(exist_ok=True)  # where it vanished
        code, _, _ = self._run(folder, Step("kill", 0))
        assert code == 0
        results, errors = _contents(folder / "out.jsonl")
        ids = Counter(json.loads(line)["id"] for line in results.splitlines())
        tally.duplicated += sum(ids.values()) - len(ids)
        tally.different += (results, errors) != self.expected

    def _run(self, folder: Path, step: Step) -> tuple[int, int, int]:
        """Exit code, results reported as done, and events of a run."""
        reads, writes = os.pipe()

        def body() -> int:
            tell = os.write  # as it is before faults come over it
            faults = Faults(folder, step.fault, step.at, step.seed)
            ear = Ear(lambda count: tell(writes, _MESSAGE.pack(_REPORTED, count)) and None)
            code = run_job(self.lines, folder / "out.jsonl", ear)
            tell(writes, _MESSAGE.pack(_EVENTS, len(faults.events)))
            return code

        pid = in_child(body)
        os.close(writes)
        with os.fdopen(reads, "rb") as pipe:
            told = dict(_MESSAGE.iter_unpack(pipe.read()))
        return exit_code(pid), told.get(_REPORTED, 0), told.get(_EVENTS, 0)

    def events_after(self, step: Step) -> int:
        """How many events a run has that follows on `step`."""
        with scratch() as folder:
            self._run(folder, step)
            return self._run(folder, Step("kill", 0))[2]

    def run_until_signal(self, seed: int) -> Tally:
        """Signals at random times: two that ask and one that does not, then a run without."""
        tally, chance = Tally(schedules=1), random.Random(seed)
        with scratch() as folder:
            for _ in range(3):
                number = chance.choice((signal.SIGINT, signal.SIGTERM, signal.SIGKILL))
                reads, writes = os.pipe()

                def body(writes: int = writes) -> int:
                    tell = os.write
                    ear = Ear(lambda count: tell(writes, _MESSAGE.pack(_REPORTED, count)) and None)
                    signal.signal(signal.SIGINT, signal.default_int_handler)
                    tell(writes, _MESSAGE.pack(_REPORTED, 0))
                    return run_job(self.lines, folder / "out.jsonl", ear, pause_s=0.002)

                pid = in_child(body)
                os.close(writes)
                with os.fdopen(reads, "rb") as pipe:
                    start = pipe.read(_MESSAGE.size)
                    time.sleep(chance.uniform(0.005, 0.06))
                    os.kill(pid, number)
                    told = dict(_MESSAGE.iter_unpack(start + pipe.read()))
                code = exit_code(pid)
                # Before it listens, the system's own way: ended by the signal.
                assert code in (0, 128 + number, -number, 99), (number, code)
                tally.faults += code != 0
                self.check(folder, told[_REPORTED], tally)
            self.finish(folder, tally)
        return tally


def journalled(output: Path) -> Counter[int]:
    """How often each index is in the journal of `output`."""
    journal = journal_path(output)
    if not journal.exists():
        return Counter()
    return Counter(r["result"]["index"] for _, r, _ in read_records(journal) if r and "result" in r)


def _contents(out: Path) -> tuple[bytes, bytes]:
    return out.read_bytes(), errors_path(out).read_bytes()


@dataclass(frozen=True)
class Share:
    """Which schedules of a sweep run: all, or the share that is every `nth`, or what that leaves."""

    seed: int = 0
    """Moves the share along, and is what schedules draw from at random."""
    nth: int = 1
    is_rest: bool = False

    def of(self, numbers: Iterable[int]) -> list[int]:
        return [number for number in numbers if ((number + self.seed) % self.nth == 0) != self.is_rest]


def every_event(bench: Bench, fault: Fault | Failure, share: Share) -> Tally:
    """The fault at every event of a run."""
    return _all(bench.run([Step(fault, at, share.seed)]) for at in share.of(range(1, bench.events + 1)))


def every_event_of_a_resumed_run(bench: Bench, fault: Fault | Failure, share: Share) -> Tally:
    """The fault at every event of a run that finds a torn journal."""
    first = Step("unsynced torn", bench.events // 2)
    events = share.of(range(1, bench.events_after(first) + 1))
    return _all(bench.run([first, Step(fault, at, share.seed)]) for at in events)


def many_crashes(bench: Bench, seeds: range, share: Share) -> Tally:
    """Jobs that crash two to five times, anyhow."""

    def schedule(number: int) -> list[Step]:
        seed = share.seed + number
        chance = random.Random(seed)
        return [
            Step(chance.choice(CRASHES), chance.randint(1, bench.events), seed) for _ in range(chance.randint(2, 5))
        ]

    return _all(bench.run(schedule(number)) for number in share.of(seeds))


def random_signals(bench: Bench, seeds: range, share: Share) -> Tally:
    """Jobs that signals end, three times each."""
    return _all(bench.run_until_signal(share.seed + number) for number in share.of(seeds))


def _all(tallies: Iterator[Tally]) -> Tally:
    return sum(tallies, Tally())


SWEEPS: dict[str, Callable[..., Tally]] = {
    **{f"{fault}, at every event": partial(every_event, fault=fault) for fault in CRASHES},
    **{
        f"{fault}, at every event of a resumed run": partial(every_event_of_a_resumed_run, fault=fault)
        for fault in ("kill", "unsynced torn", "names lost")
    },
    **{f"{failure}, from every event on": partial(every_event, fault=failure) for failure in FAILURES},
    "two to five crashes": partial(many_crashes, seeds=range(60)),
    "signals at random times, three runs": partial(random_signals, seeds=range(20)),
}
"""Every row of the fault matrix in docs/reliability.md: `sweep(bench, share=share)`."""
