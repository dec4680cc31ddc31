"""Reports long waits between ranks and ends deadlocks.

Each rank publishes what it does in the store (`Activity`). Rank 0 reads all of them and reports which ranks wait for
which. A rank that loads, plans or computes may take any time, and the others wait. Only if every rank waits for others
at different collectives is the job in a deadlock: then it ends with an error.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from zeroinf.errors import RankError

if TYPE_CHECKING:
    from zeroinf.distributed.control import Control

_TICK_S = 1.0
_REPORT_AFTER_S = 45.0
"""How long ranks may wait before it is said, and then for twice as long each time."""
_DEADLOCK_AFTER_S = 60.0
"""How long all ranks must have waited at different places before the job ends."""
_PASS_STALLED_AFTER_S = 1800.0
"""The same where some are in a pass that all ranks make together: no pass takes so long without running a layer."""
_GRACE_S = 5.0
"""How long rank 0, which holds the store, goes on so that the others can read why the job ends."""
_ENDED = "waits/ended"


@dataclass(frozen=True, slots=True)
class RankState:
    """The present activity of a rank, as other ranks read it."""

    doing: str
    """What the rank does, in words that can follow "rank 3, which"."""
    waits_at: str = ""
    """The collective at which the rank waits for others; empty if it does not wait."""
    first: int = 0
    ranks: int = 0
    """The ranks that take part in that collective: `ranks` of them from rank `first` on."""
    in_pass: bool = False
    """Whether the rank is in a pass that ranks make together, in which it may wait for them."""
    steps: int = 0
    """A counter that grows as the rank makes progress."""

    @property
    def awaited(self) -> range:
        return range(self.first, self.first + self.ranks)


class Activity:
    """The present activity of this rank. Changing it is cheap; `WaitWatch` reads it from its own thread."""

    def __init__(self) -> None:
        self._state = RankState("starts")
        self._steps = 0

    @property
    def state(self) -> RankState:
        state = self._state
        return RankState(state.doing, state.waits_at, state.first, state.ranks, state.in_pass, self._steps)

    def now(self, doing: str, *, in_pass: bool = False) -> None:
        """Set what this rank does from here on, in words that can follow "rank 3, which"."""
        self._state = RankState(doing, in_pass=in_pass)
        self._steps += 1

    def step(self) -> None:
        """Count one step of progress."""
        self._steps += 1

    @contextmanager
    def waiting(self, at: str, ranks: range) -> Iterator[None]:
        """Inside the block, this rank waits at the collective `at`, in which each of `ranks` must take part."""
        before = self._state
        self._state = RankState(before.doing, at, ranks.start, len(ranks))
        self._steps += 1
        try:
            yield
        finally:
            self._state = before
            self._steps += 1


@contextmanager
def report_long_wait(what: str, note: Callable[[str], None]) -> Iterator[None]:
    """Inside the block, call `note` from time to time if waiting for `what` takes long."""
    over = threading.Event()

    def watch() -> None:
        started, pause_s = time.monotonic(), _REPORT_AFTER_S
        while not over.wait(pause_s):
            waited_s = time.monotonic() - started
            note(f"waits for {what} (for {waited_s:.0f} s)")
            pause_s = waited_s

    threading.Thread(target=watch, name="announces", daemon=True).start()
    try:
        yield
    finally:
        over.set()


class WaitWatch:
    """A thread that publishes this rank's activity in the store. Rank 0's thread also reads those of all ranks.

    On rank 0 `note` is called with messages about long waits. In a deadlock `on_end(message, reports)` is called on
    every rank, with `reports` true on rank 0, and the process ends with the exit code of a RankError; with
    `ends_process` False it goes on, and is watched no more: it is a user's own.
    """

    def __init__(
        self,
        control: Control,
        note: Callable[[str], None],
        on_end: Callable[[str, bool], None],
        *,
        ends_process: bool = True,
    ) -> None:
        self._control, self._note = control, note
        self.on_end = on_end
        self._ends_process = ends_process
        self._stop, self._ending = threading.Event(), threading.Event()
        self._published: RankState | None = None
        self._seen: dict[int, tuple[RankState, float]] = {}
        """Of each rank: where it is, and since when."""
        self._say_after_s = _REPORT_AFTER_S
        self._thread = threading.Thread(target=self._watch, name="wait-watch", daemon=True)
        if control.world.size > 1:
            self._thread.start()

    def defer_to_deadlock(self) -> None:
        """To be called after a collective failed: if it failed because the job ends in a deadlock, this does not
        return.
        """
        if self._ending.wait(3 * _TICK_S if self._thread.is_alive() else 0):
            self._thread.join()

    def stop(self) -> None:
        """Stop, before ranks leave and take the store with them."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(2 * _TICK_S)  # not for ever: the store may have gone with rank 0

    def _watch(self) -> None:
        while not self._stop.wait(_TICK_S):
            try:
                self._publish()
                if self._control.store.check([_ENDED]):
                    self._end(self._control.store.get(_ENDED).decode(), reports=False)
                if self._control.world.is_main:
                    self._check_for_deadlock()
            except RuntimeError:  # the store went with rank 0: that is PeerWatch's to tell
                return

    def _publish(self) -> None:
        state = self._control.activity.state
        if state != self._published:
            fields = [getattr(state, name) for name in RankState.__slots__]
            self._control.store.set(_key(self._control.world.rank), json.dumps(fields))
            self._published = state

    def _check_for_deadlock(self) -> None:
        """Report long waits, or end the job if all ranks wait for each other."""
        now = time.monotonic()
        for rank in range(self._control.world.size):
            state = self._read(rank)
            if rank not in self._seen or self._seen[rank][0] != state:
                self._seen[rank] = state, now
        states = [self._seen[rank][0] for rank in range(self._control.world.size)]
        waited = {rank: now - since for rank, (state, since) in self._seen.items() if state.waits_at}
        longest = max(waited.values(), default=0.0)
        if longest < _REPORT_AFTER_S:
            self._say_after_s = _REPORT_AFTER_S
        waiting = "; ".join(_waiting_messages(states, {rank for rank in waited if waited[rank] >= _REPORT_AFTER_S}))
        if waiting and now - max(since for _, since in self._seen.values()) >= _stalled_after_s(states):
            self._end(f"ranks wait for each other, and none will come: {waiting}", reports=True)
        if waiting and longest >= self._say_after_s:
            self._note(f"{waiting} (for {longest:.0f} s)")
            self._say_after_s *= 2

    def _read(self, rank: int) -> RankState:
        key = _key(rank)
        if not self._control.store.check([key]):
            return RankState("starts")
        return RankState(*json.loads(self._control.store.get(key)))

    def _end(self, message: str, *, reports: bool) -> None:
        if self._stop.is_set():
            return
        self._ending.set()
        self.on_end(message, reports)
        if reports:
            self._control.store.set(_ENDED, message)
        self._stop.set()
        if self._ends_process:
            time.sleep(_GRACE_S if reports else 0.0)
            os._exit(RankError.exit_code)


def _waiting_messages(states: Sequence[RankState], waiting: set[int]) -> Iterator[str]:
    """A message for each collective at which ranks wait and others are missing, which names both."""
    for at in dict.fromkeys(states[rank].waits_at for rank in sorted(waiting)):
        here = [rank for rank, state in enumerate(states) if state.waits_at == at]
        missing = [rank for rank in states[here[0]].awaited if rank not in here]
        if missing:
            who = ", ".join(f"rank {rank}, which {_describe(states[rank])}" for rank in missing)
            several = len(here) > 1
            yield f"rank{'s' * several} {', '.join(map(str, here))} wait{'s' * (not several)} at {at} for {who}"


def _describe(state: RankState) -> str:
    return f"waits at {state.waits_at}" if state.waits_at else state.doing


def _stalled_after_s(states: Sequence[RankState]) -> float:
    """Seconds without any change on any rank after which the job counts as deadlocked; infinite while a rank works."""
    if all(state.waits_at for state in states):
        return _DEADLOCK_AFTER_S
    return _PASS_STALLED_AFTER_S if all(state.waits_at or state.in_pass for state in states) else float("inf")


def _key(rank: int) -> str:
    return f"waits/at/{rank}"
