"""A loaded model with a permanent feed: requests are accepted at any time, from any thread, and report events as they
run.

Each rank has one `Service`. Requests are submitted to that of rank 0, which distributes them; the other ranks only
work.
"""

from __future__ import annotations

import atexit
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal

import torch.distributed as dist

from zeroinf.distributed.control import Control
from zeroinf.errors import RankError, UsageError, ZeroinfError
from zeroinf.generation.loop import Feed
from zeroinf.generation.row import Sampling
from zeroinf.generation.scoring import TokenScores
from zeroinf.service.handles import Handle, TokenEvent
from zeroinf.service.length_checks import check_lengths, check_scored
from zeroinf.service.loaded import LoadedModel
from zeroinf.service.phases import Phases
from zeroinf.service.queue_feed import QueueFeed
from zeroinf.service.request_queues import (
    LocalRequestQueue,
    QueuedRequest,
    RequestEvent,
    SharedRequestQueue,
)
from zeroinf.service.tally import Tally

Priority = Literal["interactive", "batch"]
"""Interactive requests enter before those of batches, however many wait."""

_AHEAD = 2
"""Batches of requests that lie ready for ranks to take, of all that wait."""
_HEAR_EVERY_S = 0.01
_STOP_S = 5.0


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as the model gets it."""

    prompt: Sequence[int]
    """Token ids."""
    sampling: Sampling
    index: int = 0
    """Its place among those that share a seed."""


class Service:
    """Requests in, events out, around the loop of a `LoadedModel`, which runs in a thread of its own.

    Every rank makes one of its own model. `close` ends the loop; the model is closed by whoever opened it.
    """

    def __init__(self, model: LoadedModel, report: Callable[[Phases], object] = lambda phases: phases) -> None:
        """`report` tells what this rank has done, after generating for so long; it runs between two passes."""
        self.model = model
        self.tally = Tally()
        """What came of requests until now, on rank 0."""
        self._control: Control = model.control
        self._numbers = itertools.count()
        self._lock = threading.Condition()
        self._handles: dict[int, Handle] = {}
        self._formatted: set[int] = set()
        """Numbers of those whose answers have a format."""
        self._scores: dict[int, Future[TokenScores]] = {}
        self._error: BaseException | None = None
        self._is_closed = False
        self._is_stopping = False
        self._queue = _open_request_queue(model, self._heard)
        self._feed = QueueFeed(model, self._queue, report)
        self._loop = threading.Thread(target=self._run, name="zeroinf-loop", daemon=True)
        self._loop.start()
        if isinstance(self._queue, SharedRequestQueue) and self._control.world.is_main:
            threading.Thread(target=self._hear, args=(self._queue,), name="zeroinf-hear", daemon=True).start()
        atexit.register(self._stop)

    def submit(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        priority: Priority = "interactive",
        index: int = 0,
        stream: bool = False,
    ) -> Handle:
        """Let `prompt`, token ids, be completed. Returns at once.

        `index` is a request's place among those that share a seed: a batch's line; with 0, the same request with the
        same seed gives the same text whatever runs beside it. With `stream` events come as tokens do, else there is one
        at the end. Raises InputError for what is longer than was planned for, and where the model failed before.
        """
        (handle,) = self.submit_all([Asked(prompt, sampling, index)], priority=priority, stream=stream)
        return handle

    def submit_all(
        self, asked: Sequence[Asked], *, priority: Priority = "interactive", stream: bool = False
    ) -> list[Handle]:
        """Let each be completed, as `submit`; they can enter one pass together. Nothing is submitted where it raises
        InputError."""
        for each in asked:
            check_lengths(self.model.plan, len(each.prompt), each.sampling)
        handles = [Handle(next(self._numbers), len(each.prompt), self._cancel) for each in asked]
        with self._lock:
            self._refuse_if_over()
            for handle, each in zip(handles, asked, strict=True):
                self._handles[handle.number] = handle
                if each.sampling.answer_format is not None:
                    self._formatted.add(handle.number)
        posted = [
            QueuedRequest(handle.number, each.prompt, each.sampling, each.index, stream)
            for handle, each in zip(handles, asked, strict=True)
        ]
        self._queue.post("urgent" if priority == "interactive" else "batch", *posted)
        return handles

    def score(
        self, sequences: Sequence[tuple[Sequence[int], int]], following: Sequence[Sequence[Sequence[int]]] | None = None
    ) -> list[Future[TokenScores]]:
        """Score the tokens of each sequence of token ids from the given place on, many sequences to a pass.

        `following` has continuations for each sequence, token ids, which are scored behind its last token, each as if
        it were the only one; of one token each unless the model `shares_scores`. Like-long sequences should be
        neighbours. The first token of all has nothing before it, so the place is at least 1. What is cancelled before
        its pass does not run. Raises InputError for sequences that are longer than was planned for, UsageError where
        the plan has no memory for scores.
        """
        asked = [
            QueuedRequest(next(self._numbers), tokens, None, start, following=after)
            for (tokens, start), after in zip(sequences, following or [()] * len(sequences), strict=True)
        ]
        for each in asked:
            check_scored(self.model.plan, each, shares_scores=self.model.shares_scores)
        found = {each.number: Future[TokenScores]() for each in asked}
        with self._lock:
            self._refuse_if_over()
            self._scores |= found
        for number, future in found.items():
            future.add_done_callback(lambda future, number=number: self._drop_score(number, future))  # type: ignore[misc]
        self._queue.post("score", *asked)  # all at once, or the first would have a pass of its own
        return list(found.values())

    def _drop_score(self, number: int, future: Future[TokenScores]) -> None:
        """A score has come to its end: where its caller gave it up, it shall not run if it has not begun."""
        if future.cancelled() and self._queue.withdraw(number):
            with self._lock:
                self._scores.pop(number, None)
                if not (self._handles or self._scores):
                    self._lock.notify_all()

    def drain(self) -> None:
        """Wait until all that was submitted has ended. Raises the model's error, if it failed."""
        with self._lock:
            self._lock.wait_for(lambda: not (self._handles or self._scores))
            self.check()

    def close(self) -> None:
        """End the loop on this rank: on rank 0, what has not ended is cancelled; elsewhere, when rank 0 closes."""
        with self._lock:
            left, self._is_closed = list(self._handles.values()), True
            scored = list(self._scores)
        for handle in left:
            handle.cancel()
        for number in filter(self._queue.withdraw, scored):
            with self._lock:
                self._scores.pop(number).cancel()
        if self._control.world.is_main:
            self._queue.close()
        self._loop.join()
        atexit.unregister(self._stop)

    def wait(self) -> None:
        """On another rank than 0: work until rank 0 closes. Raises the error with which this rank failed, if any."""
        self._loop.join()
        self.check()

    def reports(self) -> list[object]:
        """The reports of all ranks, of the same moment: between two passes of each. On rank 0.

        Raises UsageError where the model is closed, and the error with which a rank failed.
        """
        self._refuse_if_over()
        number, ranks = self._queue.ask_reports(), self._control.world.size
        while (found := self._queue.reports(number, ranks)) is None:
            self._refuse_if_over()
            time.sleep(_HEAR_EVERY_S)
        return found

    @property
    def tokens(self) -> int:
        """Tokens generated until now by all ranks, those of unfinished requests included; other ranks' half a second
        late. On rank 0."""
        return self._queue.tokens

    @property
    def has_failed(self) -> bool:
        """Whether the loop ended in an error, here or on another rank."""
        return self._error is not None

    def check(self) -> None:
        """Raise the error with which the loop ended, if it did."""
        if self._error is not None:
            raise self._error

    def _refuse_if_over(self) -> None:
        self.check()
        if self._is_closed:
            raise UsageError("the model is closed", hint="open it again")
        if not self._control.world.is_main:
            raise UsageError("requests go to rank 0, which hands them to the others", hint="submit there")

    def _cancel(self, number: int) -> None:
        if self._queue.withdraw(number):
            self._heard(RequestEvent(number, finish_reason="cancelled"))
        else:
            self._queue.cancel(number)

    def _heard(self, told: RequestEvent) -> None:
        """Tell whoever waits. From any thread of rank 0."""
        with self._lock:
            if told.scores is not None:
                future = self._scores.pop(told.number)
            else:
                handle = self._handles[told.number]
                self.tally.add(told, handle.prompt_tokens, has_format=told.number in self._formatted)
                if told.finish_reason is not None:
                    del self._handles[told.number]
                    self._formatted.discard(told.number)
            if not (self._handles or self._scores):
                self._lock.notify_all()
        if told.scores is not None:
            if future.set_running_or_notify_cancel():
                future.set_result(told.scores)
            return
        handle.heard(
            TokenEvent(
                text=told.text,
                tokens=told.tokens,
                likelihoods=told.likelihoods,
                finish_reason=told.finish_reason,
                problem=told.problem,
            )
        )

    def _run(self) -> None:
        feed = self._feed
        try:
            self.model.run(
                Feed(
                    take=feed.take,
                    done=feed.done,
                    urgent=feed.urgent,
                    cancelled=feed.cancelled,
                    scores=feed.scores,
                    wait=feed.wait,
                    grew=feed.grew,
                    stop_requested=lambda: int(self._is_stopping),
                )
            )
            feed.flush()
        except BaseException as error:  # a thread has no caller: whoever waits for an answer gets it
            self.fail(error)

    def _hear(self, queue: SharedRequestQueue) -> None:
        """Take in what other ranks tell, as long as anything is under way."""
        try:
            while self._loop.is_alive() or self._handles or self._scores:
                if not queue.hear():
                    self.fail(RankError("another rank has failed", hint="its own message says why"))
                    return
                time.sleep(_HEAR_EVERY_S)
        except RuntimeError as error:
            self.fail(RankError(f"lost the store that ranks share: {error}"))

    def fail(self, error: BaseException) -> None:
        """Nothing can go on: whoever waits is told, and nothing more is taken."""
        known = error if isinstance(error, ZeroinfError) else ZeroinfError(f"the generation loop failed: {error!r}")
        known.__cause__ = None if known is error else error
        if isinstance(self._queue, SharedRequestQueue):
            self._queue.fail()
        with self._lock:
            if self._error is None:
                self._error = known
            handles, self._handles = list(self._handles.values()), {}
            scores, self._scores = list(self._scores.values()), {}
            self._lock.notify_all()
        for handle in handles:
            handle.failed(known)
        for future in filter(Future.set_running_or_notify_cancel, scores):
            future.set_exception(known)

    def _stop(self) -> None:
        """The process ends and nobody has closed: the loop must not run into its end."""
        self._is_stopping = True
        if self._control.world.is_main:
            self._queue.close()
        self._loop.join(_STOP_S)


def _open_request_queue(
    model: LoadedModel, heard: Callable[[RequestEvent], None]
) -> LocalRequestQueue | SharedRequestQueue:
    control, ahead = model.control, _AHEAD * model.plan.batch_size * model.plan.streams
    if control.world.size == 1:
        return LocalRequestQueue(heard)
    store = dist.PrefixStore("service", control.store)
    queue = SharedRequestQueue(store, 0, ahead, heard) if control.world.is_main else None
    control.all_gather(None)  # rank 0 has made it
    return queue or SharedRequestQueue(store, control.world.rank, ahead, heard)
