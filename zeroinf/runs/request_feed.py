"""A rank's feed for the generation loop: takes requests from the shared queue and sends results to rank 0."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch.distributed as dist

from zeroinf.generation.row import Row
from zeroinf.jobs.output import Saved, Writer
from zeroinf.jobs.work_list import WorkList
from zeroinf.runs.queue import ResultBox, TokenCount, WorkQueue
from zeroinf.service.handles import Completion
from zeroinf.service.observer import Observer, Progress, tokens_left
from zeroinf.service.phases import PhaseClock, Phases
from zeroinf.service.requests import Refusal, Result, Work
from zeroinf.service.results import result_of

if TYPE_CHECKING:
    from zeroinf.planner.timing import Timing
    from zeroinf.runs.prepare import PreparedRun
    from zeroinf.service.loaded import LoadedModel

_TELL_EVERY_S = 0.5
_POLL_S = 0.05
_DRAWS = 4


class Output:
    """The job's output on rank 0, safe to abandon from another thread."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._lock = threading.Lock()
        self._abandoned: Saved | None = None
        self.durable = 0
        """Results that were so at the last `settle`; to be read without waiting for whoever writes."""
        self.results = 0
        """Those of this run, failed ones included."""
        self.failed = 0
        self.cut = 0
        """Those that reached their most tokens."""
        self.cut_answers = 0
        """Those of them whose answers have a format, which is not complete."""
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.unfinished_tokens = 0
        """Generated for requests that have no result yet, as was last told."""

    def add(self, result: Result, *, has_format: bool = False) -> None:
        with self._lock:
            if self._abandoned is None:
                self._writer.add(result)
        self.results += 1
        self.failed += result.failed
        self.cut += result.finish_reason == "length"
        self.cut_answers += has_format and result.finish_reason == "length"
        self.prompt_tokens += result.prompt_tokens
        self.completion_tokens += result.completion_tokens

    def progress(self, progress: Progress) -> None:
        """Keep how far the run is where `zeroinf status` finds it."""
        self.unfinished_tokens = max(0, progress.tokens - self.completion_tokens)
        with self._lock:
            if self._abandoned is None:
                self._writer.progress(progress)

    def settle(self) -> int:
        """Make results durable if that is due; their number, those of earlier runs included."""
        with self._lock:
            if self._abandoned is None:
                self.durable = self._writer.settle()
            return self.durable

    def finish(self) -> Sequence[Refusal]:
        """Publish all results; returns the requests that came to nothing, those of earlier runs included."""
        with self._lock:
            return self._writer.finish()

    def abandon(self, why: str) -> Saved:
        """Save what there is; a second call says the same again."""
        with self._lock:
            if self._abandoned is None:
                self._abandoned = self._writer.abandon(why)
            return self._abandoned


class JobProgress:
    """Takes in the results of a run, whoever has computed them, and says how far the run is."""

    def __init__(self, work: WorkList, rows_before: int, output: Output, timing: Timing | None = None) -> None:
        """`rows_before`: requests that earlier runs have done; `timing`: as planned for `work`."""
        self._work, self._rows = work, len(work)
        self._asked = sum(work.new_tokens)
        self._asked_of_done = self._ended_early = 0
        self._rows_before, self._output = rows_before, output
        self._expected_s = None if timing is None else self._asked / timing.tokens_per_second

    def add(self, result: Result) -> None:
        """Write a result. Raises OutputError."""
        self._output.add(result, has_format=self._work.has_format_at(result.index))
        asked = self._work.new_tokens_at(result.index)
        self._asked_of_done += asked
        self._ended_early += result.completion_tokens < asked

    def told(self, tokens: int, elapsed_s: float, *, streamed_bytes: int = 0, nodes: int = 0) -> Progress:
        """Make results durable if that is due, and keep beside them how far the run is, after so many tokens and
        seconds on so many nodes of a cluster."""
        output = self._output
        progress = Progress(
            rows_done=output.settle(),
            rows=self._rows_before + self._rows,
            tokens=tokens,
            tokens_left=tokens_left(
                rows=self._rows - output.results,
                most=max(0, self._asked - self._asked_of_done - max(0, tokens - output.completion_tokens)),
                tokens=tokens,
                ended_early=self._ended_early,
            ),
            elapsed_s=elapsed_s,
            streamed_bytes=streamed_bytes,
            nodes=nodes,
            expected_s=self._expected_s,
        )
        output.progress(progress)
        return progress


class RequestFeed:
    """The feed of one rank: the generation loop takes rows from it and returns them to it. On rank 0 it also gathers
    the results of all ranks.
    """

    def __init__(
        self, prepared: PreparedRun, model: LoadedModel, store: dist.Store, output: Output | None, observer: Observer
    ) -> None:
        self._prepared = prepared
        self._live: dict[int, Work] = {}
        """Those whose rows are here, by their indices."""
        self._progress = None
        if output is not None:
            self._progress = JobProgress(prepared.work, prepared.rows_before, output, prepared.plan.timing)
        self._model = model
        self._part = model.part
        engine = model.engine
        self._place = model.part.activity
        # Whoever draws much leaves nothing to the others in the end; rows of one draw are grouped by their length.
        plan = prepared.plan
        at_once = plan.world_size == 1 or plan.static_batches or not plan.anatomy.is_paged or not engine.shares_passes
        draw = plan.batch_size if at_once else max(1, plan.batch_size // _DRAWS)
        self._queue = WorkQueue(store, len(prepared.work), draw)
        self._box = ResultBox(store)
        self._tokens = TokenCount(store)
        self._untold = 0
        self._walks = 1 if engine.in_step else prepared.plan.streams
        self._output = output
        self._observer = observer
        self._engine = engine
        self._streamed_before = engine.stats().streamed_bytes
        self._told = time.perf_counter()
        self._clock = PhaseClock()

    def take(self) -> list[Row]:
        """Rows of the next micro-batch; none when the queue is empty. Ranks of one stream get the same."""
        drawn = self._part.broadcast(self._queue.draw() if self._part.world.is_main else None)
        if drawn:
            self._clock.drew()
        found = [self._prepared.work[position] for position in drawn]
        self._live.update((work.index, work) for work in found)
        return [_row(work, self._model) for work in found]

    def done(self, row: Row) -> None:
        """Send a finished row's result on its way, once a stream."""
        work = self._live.pop(row.index)
        if not self._part.world.is_main:
            return
        assert row.finish_reason is not None
        found = Completion(
            tokens=row.generated,
            text=row.text,
            finish_reason=row.finish_reason,
            prompt_tokens=len(work.prompt),
            likelihoods=row.likelihoods,
            problem=row.problem,
        )
        self._box.put(result_of(work, found, self._model.codec))

    def grew(self, rows: int) -> None:
        """Count a forward's tokens, and now and then gather results and say how far the run is."""
        self._untold += rows if self._part.world.is_main else 0
        if rows:
            self._clock.grew()
        if time.perf_counter() - self._told >= _TELL_EVERY_S:
            self._tell()

    def gather(self) -> None:
        """Take in every result that has arrived (rank 0; elsewhere there is nothing to do)."""
        if self._progress is not None:
            for result in self._box.collect():
                self._progress.add(result)

    def gather_all(self) -> None:
        """Wait for the results of every rank."""
        if self._output is None:
            return
        with self._place.waiting("the results of all ranks", range(self._prepared.plan.world_size)):
            while self._output.results < len(self._prepared.work):
                before = self._output.results
                self._tell()
                if self._output.results > before:
                    self._place.step()
                if self._output.results < len(self._prepared.work):
                    time.sleep(_POLL_S)

    def finish(self) -> float:
        """Tell the last progress, whose figures are the report's; seconds since the stream began."""
        elapsed_s = self._clock.elapsed_s
        if self._output is not None:
            self._show(self._output.completion_tokens, elapsed_s)
        return elapsed_s

    def phases(self) -> Phases:
        """This rank's times until now."""
        return self._clock.phases()

    def _tell(self) -> None:
        self._told = time.perf_counter()
        tokens = self._tokens.add(self._untold)
        self._untold = 0
        self.gather()
        self._show(tokens, self._clock.elapsed_s)

    def _show(self, tokens: int, elapsed_s: float) -> None:
        """Show how far the run is, and keep it beside the results."""
        if self._progress is not None:
            streamed = (self._engine.stats().streamed_bytes - self._streamed_before) * self._walks
            self._observer.progress(self._progress.told(tokens, elapsed_s, streamed_bytes=streamed))


class WarmUpFeed:
    """A few tokens of the first micro-batch, whose results are discarded: first forwards are slower than later ones."""

    def __init__(self, prepared: PreparedRun, model: LoadedModel, tokens: int) -> None:
        first = prepared.work[: prepared.plan.batch_size]
        self._rows = [_row(work, model, tokens) for work in first]

    def take(self) -> list[Row]:
        rows, self._rows = self._rows, []
        return rows


def _row(work: Work, model: LoadedModel, tokens: int | None = None) -> Row:
    """A row for `work`, or for a few `tokens` of it."""
    sampling = work.sampling
    if tokens is not None:
        sampling = replace(sampling, max_new_tokens=tokens, ignore_eos=True, answer_format=None)
    return model.row(work.prompt, sampling, index=work.index)
