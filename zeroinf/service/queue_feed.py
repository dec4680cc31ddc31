"""The generation loop's feed of one rank: takes requests from a queue as rows, and reports there what comes of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from zeroinf.generation.row import Row
from zeroinf.generation.scoring import ScoreBatch, Scored, TokenScores
from zeroinf.service.loaded import LoadedModel
from zeroinf.service.phases import PhaseClock, Phases
from zeroinf.service.request_queues import Kind, QueuedRequest, RequestEvent, RequestQueue
from zeroinf.service.streaming import TextStream

_TAKES = 4
"""Ranks that share work take a part of a batch at a time, so that none is left without in the end."""


class _Running:
    """A request on this rank: its row, and how much of it has been told."""

    def __init__(self, posted: QueuedRequest, row: Row, stops: Sequence[str]) -> None:
        self.posted, self.row = posted, row
        self._told = 0
        self._text = TextStream(row.decode, (*row.sampling.stop, *stops))

    def news(self) -> RequestEvent | None:
        """The text and tokens that have come since the last call, if any."""
        row = self.row
        if row.finish_reason is None and len(row.generated) == self._told:
            return None
        first, self._told = self._told, len(row.generated)
        ended = row.finish_reason is not None
        return RequestEvent(
            self.posted.number,
            self._text.finish(row.text) if ended else self._text.take(row.generated),
            row.generated[first:],
            row.likelihoods[first:],
            row.finish_reason,
            problem=row.problem,
        )


class QueueFeed:
    """The loop's feed of one rank: takes from its queue what there is room for, and tells it what comes of it.

    Ranks that hold one model together take what the first of them takes.
    """

    def __init__(self, model: LoadedModel, queue: RequestQueue, report: Callable[[Phases], object]) -> None:
        self._model, self._queue, self._part = model, queue, model.part
        self._report, self._reported, self._clock = report, 0, PhaseClock()
        self._running: dict[int, _Running] = {}
        """By the request's number."""
        self._streamed: dict[int, _Running] = {}
        self._of_row: dict[int, int] = {}
        """A request's number by its row's id."""
        self._told: list[RequestEvent] = []
        self._held: list[QueuedRequest] = []
        """Sequences to be scored that were taken, and turned out to be too long for the pass."""
        plan = model.plan
        self._shares = plan.streams > 1 and plan.anatomy.is_paged and model.engine.shares_passes

    def cancelled(self) -> list[Row]:
        self.flush()
        numbers, asked = self._from_first(lambda: (self._queue.look(), self._queue.reports_asked))
        while self._reported < asked:
            self._reported += 1
            self._queue.report(self._reported, self._model.control.world.rank, self._report(self._clock.phases()))
        return [self._running[number].row for number in numbers if number in self._running]

    def _from_first(self, ask: Callable[[], tuple[Sequence[int], int]]) -> tuple[Sequence[int], int]:
        return self._part.broadcast(ask() if self._part.world.is_main else None)  # type: ignore[no-any-return]

    def _take(self, kind: Kind, most: int) -> list[QueuedRequest]:
        taken: list[QueuedRequest] = self._part.broadcast(
            self._queue.take(kind, most) if self._part.world.is_main and most > 0 else []
        )
        return taken

    def urgent(self) -> list[Row]:
        return self._rows(self._take("urgent", self._model.scheduler.free_rows), urgent=True)

    def take(self) -> list[Row] | None:
        rows = self._model.plan.batch_size
        taken = self._take("batch", max(1, rows // _TAKES) if self._shares else rows)
        if taken:
            return self._rows(taken, urgent=False)
        is_over: bool = self._part.broadcast(self._queue.is_over if self._part.world.is_main else None)
        return [] if is_over else None

    def _rows(self, taken: Sequence[QueuedRequest], *, urgent: bool) -> list[Row]:
        found = []
        if taken:
            self._clock.drew()
        for posted in taken:
            assert posted.sampling is not None
            row = self._model.row(posted.tokens, posted.sampling, index=posted.index, urgent=urgent)
            running = self._running[posted.number] = _Running(posted, row, self._model.stops)
            self._of_row[id(row)] = posted.number
            if posted.is_streamed:
                self._streamed[posted.number] = running
            found.append(row)
        return found

    def scores(self) -> list[ScoreBatch]:
        """Take as many sequences as a pass has memory for in the place of prompts."""
        taken, self._held = self._held, []
        while more := self._take("score", self._room_for(taken, self._model.plan.prompt_tokens)):
            taken += more
        while len(taken) > 1 and self._room_for(taken, 1) < 0:
            self._held.insert(0, taken.pop())
        return list(self._model.score_batches([self._scored(posted) for posted in taken]))

    def _room_for(self, taken: Sequence[QueuedRequest], longest: int) -> int:
        """The number of sequences that fit a pass beside those that were `taken`, if they are as long as the longest of
        them, or as `longest` where there are none; below 0 where those that were taken do not fit."""
        room, lengths = self._model.scheduler.limits.prefill_tokens, [posted.length for posted in taken]
        if not lengths:
            return max(1, room // max(1, longest))
        used = sum(lengths) if self._model.shares_scores else len(lengths) * max(lengths)
        return (room - used) // max(lengths)

    def _scored(self, posted: QueuedRequest) -> Scored:
        def done(scores: TokenScores) -> None:
            self._told.append(RequestEvent(posted.number, scores=scores))

        return Scored(posted.tokens, posted.index, done, posted.following)

    def wait(self) -> None:
        self.flush()
        started = time.perf_counter()
        self._queue.wait()
        self._clock.idled(time.perf_counter() - started)

    def done(self, row: Row) -> None:
        running = self._running.pop(self._of_row.pop(id(row)))
        self._streamed.pop(running.posted.number, None)
        if (news := running.news()) is not None:
            self._told.append(news)

    def grew(self, rows: int) -> None:
        """Rows have got their tokens of a pass."""
        if rows:
            self._clock.grew()
        if self._part.world.is_main:
            self._queue.count(rows)
        for running in self._streamed.values():
            if (news := running.news()) is not None:
                self._told.append(news)
        self.flush()

    def flush(self) -> None:
        """Tell what there is to tell."""
        told, self._told = self._told, []
        if self._part.world.is_main:
            self._queue.tell(told)
