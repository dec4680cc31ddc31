"""The generation loop: takes rows from a feed, runs passes, and returns finished rows.

Input: an engine, a scheduler and a feed of rows. Output: rows with their generated tokens. It knows nothing of files,
plans or where weights are kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from zeroinf.distributed.control import Control
from zeroinf.engines.base import Engine
from zeroinf.generation.groups import Group
from zeroinf.generation.lifetimes import Lifetimes
from zeroinf.generation.micro_batch import BatchState, Chosen, MicroBatch, running
from zeroinf.generation.pass_limits import Limits
from zeroinf.generation.row import Row
from zeroinf.generation.scheduler import Scheduler
from zeroinf.generation.scoring import ScoreBatch

_WASTED_PASSES = 0.02
"""A pass is begun before the tokens of the last one are known if the chance that they end all rows is smaller."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Feed:
    """The interface through which the loop takes rows and returns them."""

    take: Callable[[], Sequence[Row] | None]
    """More rows, each of which finds room in the pool. Empty: there will be no more. None: there are none now."""
    done: Callable[[Row], None]
    """Receives each row as it ends."""
    urgent: Callable[[], Sequence[Row]] = tuple
    """Rows that enter before those that wait: asked for before every pass with a free place."""
    cancelled: Callable[[], Sequence[Row]] = tuple
    """Rows of which nobody wants more, asked for before every pass. They end as they are; some may have ended."""
    scores: Callable[[], Sequence[ScoreBatch]] = tuple
    """Sequences to be scored in the next pass, as many as there is memory for where it computes no prompts."""
    wait: Callable[[], None] = lambda: None
    """Called where there is nothing to do now: returns when there may be, or after a moment."""
    grew: Callable[[int], None] = lambda rows: None
    """Told how many rows gained a token in a pass."""
    stop_requested: Callable[[], int] = lambda: 0
    shrank: Callable[[Limits], None] = lambda limits: None
    """Told the limits of passes from now on, after one ran out of GPU memory."""


def generate(engine: Engine, control: Control, batch_state: BatchState, scheduler: Scheduler, feed: Feed) -> int:
    """Run rows until `feed` has none left on any rank, or a stop is requested on one of them.

    Where an engine's ranks must step together, a rank without rows keeps the others company with forwards of one token.

    A pass that runs out of GPU memory is made again with forwards half as large, and those that follow are as small:
    where there were prompts, in tokens, so that steps of all rows still have one forward. Raises torch.OutOfMemoryError
    when one of a single row does not fit, or the engine cannot go on.

    Returns 0, or what `stop_requested` said when it ended the loop with rows unfinished.
    """
    passes = _Passes(engine, batch_state, scheduler, feed)
    ranks = _Agreement(control) if engine.in_step else None
    while True:
        groups, scored = passes.next()
        busy, is_open, stop = bool(groups or scored), not passes.is_dry, feed.stop_requested()
        if ranks is not None:
            busy, is_open, stop = ranks.agree(busy, is_open, stop)
        if stop or not (busy or is_open):
            passes.accept()
            return stop
        if not busy:
            feed.wait()
            continue
        if ranks is not None:
            ranks.foretell(passes.likely_goes_on(groups), feed.stop_requested())
            control.activity.now(f"is in pass {ranks.passes}", in_pass=True)
        ran_out = False
        try:
            if groups or scored:
                passes.run(groups, scored)
            else:
                engine.forward([_company(batch_state.device)])
        except torch.OutOfMemoryError:
            keeps_company = not (groups or scored)
            if not (keeps_company or passes.can_halve(groups, scored)) or not engine.recover():
                raise
            ran_out = not keeps_company
        if ran_out:  # not while the error is handled: it keeps alive what the failed forwards had made
            passes.halve(groups, scored)


class _Passes:
    """Passes over the rows of one rank. The tokens of each are read while the next one runs, wherever they may be."""

    def __init__(self, engine: Engine, batch_state: BatchState, scheduler: Scheduler, feed: Feed) -> None:
        self._engine, self._batch_state, self._scheduler, self._feed = engine, batch_state, scheduler, feed
        self._chosen: list[Chosen] = []
        self._batches: list[MicroBatch] = []
        self._inputs: list[dict[str, Any]] = []
        """Of the next pass."""
        self._scores_again: list[ScoreBatch] = []
        """Sequences that were taken and have not run, such as halves of a pass that ran out of memory: each has a pass
        of its own."""
        self._has_scored = False
        """Whether the last pass scored anything."""
        self.is_dry = False
        """Whether there will be no more rows."""
        self._full_since: float | None = None
        """When the pass before the last one ended, if the last one was a full step."""
        self._was_full = False
        self._lifetimes = Lifetimes()

    def next(self) -> tuple[list[Group], Sequence[ScoreBatch]]:
        """The micro-batches of the next pass, their inputs made: of rows, and of sequences to be scored. None: nothing
        is left for now.

        A rank in step that has agreed to a pass must make it, so all that can fail before the forward is done here.
        """
        while True:
            if not self._goes_on():
                self.accept()  # a pass started before the tokens are known would be wasted if they ended all rows
            for row in self._feed.cancelled():
                self._cancel(row)
            self._fill()
            is_again = bool(self._scores_again)
            scored = self._next_scores()
            alone = bool(scored) and (is_again or self._scheduler.limits.scores_alone)
            groups = [] if alone else self._scheduler.next_pass(prompts=not scored)
            if self._has_room(groups, scored):
                return groups, scored
            self.halve(groups, scored)

    def _next_scores(self) -> Sequence[ScoreBatch]:
        """The sequences that are scored in the next pass. They take the place of prompts, or of all rows, which have
        the one after."""
        scheduler, has_scored = self._scheduler, self._has_scored
        self._has_scored = False
        waits = bool(scheduler.seats) if scheduler.limits.scores_alone else scheduler.has_prompts
        if (scheduler.seats and scheduler.limits.together) or (has_scored and waits):
            return ()
        found = self._scores_again[:1] or list(self._feed.scores())
        if self._scores_again:
            self._scores_again = self._scores_again[1:]
        elif not self._engine.shares_passes:  # each micro-batch is a walk of its own
            found, self._scores_again = found[:1], found[1:]
        self._has_scored = bool(found)
        return found

    def _has_room(self, groups: Sequence[Group], scored: Sequence[ScoreBatch]) -> bool:
        """Make the inputs of a pass, if there is room. Raises torch.OutOfMemoryError where no pass is smaller."""
        try:
            for group in groups:
                self._batches.append(self._batch_state.batch(group))
                self._inputs.append(self._batches[-1].inputs())
            self._batch_state.begin(self._batches)
            self._inputs += [batch.inputs() for batch in scored]
        except torch.OutOfMemoryError:
            if not self.can_halve(groups, scored):
                raise
            self._batches, self._inputs = [], []
            return False
        return True

    def _cancel(self, row: Row) -> None:
        if not self._scheduler.holds(row):  # it has ended, or its last token is on its way
            return
        seat = self._scheduler.withdraw(row)
        self._batch_state.close([seat] if seat is not None else [])
        row.cancel()
        self._feed.done(row)

    def run(self, groups: Sequence[Group], scored: Sequence[ScoreBatch]) -> None:
        """One pass, and the choice of the tokens that follow."""
        batches, inputs = self._batches, self._inputs
        self._batches, self._inputs = [], []
        packed = any(batch.group.is_packed for batch in batches) or any(batch.is_packed for batch in scored)
        with running(self._engine.model, self._batch_state.mixers, packed=packed):
            outputs = self._engine.forward(inputs)
        del inputs
        self.accept()
        self._was_full = not scored and self._scheduler.is_full_step(groups)
        while batches:
            batch = batches.pop(0)
            chosen = batch.choose(outputs.pop(0))
            self._batch_state.close(self._scheduler.advance(batch.group))
            if chosen is not None:
                self._chosen.append(chosen)
        for sequences, output in zip(scored, outputs, strict=True):
            sequences.accept(output)

    def accept(self) -> None:
        """Give the tokens of the last pass to their rows."""
        grown, chosen = 0, self._chosen
        self._chosen = []
        for each in chosen:
            rows, ended = each.accept(self._batch_state.rules)
            grown += rows
            early = [seat for seat in ended if not seat.has_left]
            self._scheduler.release(early)
            self._batch_state.close(early)
            for seat in ended:
                self._lifetimes.note(len(seat.row.generated), was_cut=seat.row.finish_reason == "length")
                if seat.row.finish_reason == "error":
                    self._scheduler.forget_prefix(seat)
                self._feed.done(seat.row)
        if chosen:
            self._time_step()
            self._feed.grew(grown)

    def _time_step(self) -> None:
        """The last pass has ended: count the time since the one before, if both were full steps."""
        now, counts = time.perf_counter(), self._scheduler.counts
        if self._was_full and self._full_since is not None:
            counts.full_steps += 1
            counts.full_steps_s += now - self._full_since
        self._full_since = now if self._was_full else None

    def can_halve(self, groups: Sequence[Group], scored: Sequence[ScoreBatch]) -> bool:
        """Whether a pass can be smaller than this one."""
        return (
            len(scored) + bool(groups) > 1
            or any(len(batch.sequences) > 1 for batch in scored)
            or (bool(groups) and self._scheduler.can_halve(groups))
        )

    def halve(self, groups: Sequence[Group], scored: Sequence[ScoreBatch]) -> None:
        """Go on with smaller forwards after a pass that broke; what was to be scored, which is taken for the reason,
        comes later, in halves."""
        self.accept()
        self._scores_again += [half for batch in scored for half in batch.halves()]
        self._scheduler.compute_anew(groups)
        if scored:
            self._scheduler.halve_scores(max(batch.columns for batch in scored))
        else:
            self._batch_state.close(self._scheduler.halve(groups))
        self._feed.shrank(self._scheduler.limits)

    def likely_goes_on(self, groups: Sequence[Group]) -> bool:
        """Whether there is likely a pass after that of `groups`; two rows that may end early hardly do so together."""
        after = [
            seat
            for group in groups
            for seat, chooses in zip(group.seats, group.chooses, strict=True)
            if not seat.has_left and seat.known + chooses < seat.total
        ]
        sure = any(not seat.may_end_early for seat in after)
        return sure or len(after) > 1 or bool(self._scores_again) or self._scheduler.has_more_than(groups)

    def _goes_on(self) -> bool:
        """Whether some row needs another pass, whatever tokens have been chosen; or very likely does, where the device
        would be idle while the host reads them and prepares the next pass."""
        live = 0
        for seat in self._scheduler.seats:
            if not (seat.may_end_early or seat.has_left):
                return True
            live += not seat.has_left
        open_ones = [seat for each in self._chosen for seat in each.seats if not seat.has_left]
        if live > len(open_ones):
            return True
        if not live or not self._scheduler.limits.runs_ahead:
            return False
        tokens = [seat.known - len(seat.row.prompt) for seat in open_ones]
        return not self._lifetimes.all_end(tokens, _WASTED_PASSES)

    def _fill(self) -> None:
        """Admit rows as long as there are rows and room."""
        if self._scheduler.wants_urgent:
            self._scheduler.add(self._feed.urgent())
        while True:
            admitted = self._scheduler.admit()
            self._batch_state.open(admitted, self._scheduler.take_dropped())
            if self.is_dry or not self._scheduler.wants_rows:
                return
            rows = self._feed.take()
            if rows is None:
                return
            self.is_dry = not rows
            self._scheduler.add(rows)


class _Agreement:
    """Ranks in step agree before each forward whether there is one more.

    Asking makes the host wait for the slowest rank and the network. So each rank says one forward ahead what it
    expects, and the answer is there in time; only where nobody expects to go on are ranks asked for certain. An
    expectation that fails costs one forward of company, at the end of the work; a stop comes one forward later.
    """

    def __init__(self, control: Control) -> None:
        self._control = control
        self.passes = 0
        """Those that were agreed to."""
        self._expected: Callable[[], tuple[int, ...]] = _nothing_expected

    def foretell(self, busy: bool, stop: int) -> None:
        """Say what this rank expects of the forward after the next. Every rank must call it after `agree`."""
        self._expected = self._control.start_all_reduce_max(busy, stop)

    def agree(self, busy: bool, is_open: bool, stop: int) -> tuple[bool, bool, int]:
        """Whether any rank has work, whether there may be more if none has, and a stop if one was requested on any:
        the same on every rank."""
        any_busy, any_stop = self._expected()
        self._expected = _nothing_expected
        any_open = 1
        if not any_busy and not any_stop:
            any_busy, any_open, any_stop = self._control.all_reduce_max(busy, is_open, stop)
        self.passes += bool(any_busy)
        return bool(any_busy), bool(any_open), any_stop


def _nothing_expected() -> tuple[int, ...]:
    return 0, 0


def _company(device: torch.device) -> dict[str, object]:
    return {"input_ids": torch.zeros(1, 1, dtype=torch.int64, device=device), "use_cache": False}
