"""A session: a model that is planned, loaded and open for any number of calls, for the Python API and evaluations."""

from __future__ import annotations

import pickle
import time
import warnings
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any

import torch

from zeroinf.distributed.control import Control, OtherRankFailedError
from zeroinf.distributed.waits import WaitWatch
from zeroinf.distributed.watch import PeerWatch
from zeroinf.distributed.world import World, world_from_environment
from zeroinf.engines.zero.config import build_zero_config
from zeroinf.errors import InputError, RankError, ZeroinfError
from zeroinf.generation.settings import notes, refuse_sampling
from zeroinf.hardware.process import process_age_s, uncollected
from zeroinf.model.anatomy import Anatomy
from zeroinf.model.source import ModelSource
from zeroinf.options.model import anatomy_of, source_of
from zeroinf.options.options import RunOptions
from zeroinf.options.planning import plan_run
from zeroinf.planner.plan import Plan
from zeroinf.planner.workload import Lengths
from zeroinf.runs.measure import RankMeter, streamed_by_all
from zeroinf.runs.ranks import Ranks, SessionSpec
from zeroinf.runs.report import RankReport, RunReport
from zeroinf.service.core import Asked, Priority, Service
from zeroinf.service.device import pick_device
from zeroinf.service.handles import Completion, Handle
from zeroinf.service.length_checks import check_lengths
from zeroinf.service.loaded import LoadedModel
from zeroinf.service.observer import Observer, Progress, tokens_left
from zeroinf.service.requests import Request, Result, Work
from zeroinf.service.results import result_of
from zeroinf.service.text import encode_prompt

_POLL_S = 0.02
_TELL_EVERY_S = 0.5


class CallProgress:
    """Says how far a call is. Tokens are those of all calls that run beside it."""

    def __init__(self, service: Service, requests: Sequence[Request]) -> None:
        self._service, self._rows = service, len(requests)
        self._most = {request.index: request.sampling.max_new_tokens for request in requests}
        self._asked_of_all = sum(request.sampling.max_new_tokens for request in requests)
        self._asked_of_done = self._generated = self._ended_early = self._done = 0
        self._tokens_before, self._started = service.tokens, time.perf_counter()

    def add(self, result: Result) -> None:
        """A request has its result."""
        asked = self._most[result.index]
        self._done += 1
        self._asked_of_done += asked
        self._generated += result.completion_tokens
        self._ended_early += result.completion_tokens < asked

    def now(self) -> Progress:
        """The progress at this moment."""
        tokens = self._service.tokens - self._tokens_before
        unfinished = max(0, tokens - self._generated)
        return Progress(
            rows_done=self._done,
            rows=self._rows,
            tokens=tokens,
            tokens_left=tokens_left(
                rows=self._rows - self._done,
                most=max(0, self._asked_of_all - self._asked_of_done - unfinished),
                tokens=tokens,
                ended_early=self._ended_early,
            ),
            elapsed_s=time.perf_counter() - self._started,
            streamed_bytes=0,
        )


def _next_of(finished: SimpleQueue[int]) -> int | None:
    """The number of the next request that has finished; None while there is none for so long that one wants to know."""
    try:
        return finished.get(timeout=_TELL_EVERY_S)
    except Empty:
        return None


class Session:
    """A `Service` of a model that was planned for prompts and completions of up to `lengths`.

    Under a launcher every rank makes one and calls it alike: rank 0's requests are run by all ranks, and all ranks get
    the results.
    """

    def __init__(
        self,
        options: RunOptions,
        source: ModelSource,
        anatomy: Anatomy,
        lengths: Lengths,
        requests: int | None,
        world: World,
        device: torch.device,
        observer: Observer,
        ranks: Ranks | None = None,
        timed: Callable[[Plan], Plan] = lambda plan: plan,
    ) -> None:
        """Plan and load; `ranks`, if they were started for this session, end with it. `timed` may say in the plan how
        fast what is to come will be, where it is no generation.

        Raises what a run raises before its first token, on every rank if on rank 0."""
        self.source = source
        self._observer = observer
        self._calls = 0
        self._is_sound = False
        """Whether all ranks can leave together."""
        self._closing = ExitStack()
        try:
            if ranks is not None:
                self._closing.callback(ranks.close)
            self._control = Control(world, device.type)
            self._closing.callback(self._leave)
            self._watch_ranks(observer)
            observer.doing("planning")
            with uncollected():
                planned, own_config = self._control.run_on_main(
                    lambda: plan_run(options, source, anatomy, lengths, requests, world, device.type, observer.note)[:2]
                )
            self.model = LoadedModel(
                timed(planned),
                source,
                self._control,
                device,
                observer,
                zero_config=own_config or build_zero_config(planned),
                gpu_memory=options.gpu_memory,
            )
            self._closing.callback(self.model.close)
            self._meter, self._ready_s, self._tokenize_s = RankMeter(self.model), process_age_s(), 0.0
            self.service = Service(self.model, lambda phases: self._meter.report([phases], self.model.peak.so_far()))
            self._closing.callback(self.service.close)
        except BaseException as error:
            self._closing.close()
            if self._lost:
                raise RankError(self._lost) from error
            raise
        if self._lost:
            self.service.fail(RankError(self._lost))

    def _watch_ranks(self, observer: Observer) -> None:
        """Learn of ranks that die, and of ranks that wait for each other, also while they load."""
        self._lost = ""
        if self._control.world.size == 1:
            return
        peers = PeerWatch(self._control, lambda message, reports: self._lose(message), ends_process=False)
        waits = WaitWatch(
            self._control, observer.note, lambda message, reports: self._lose(message), ends_process=False
        )
        self._closing.callback(waits.stop)
        self._closing.callback(peers.stop)

    def _lose(self, message: str) -> None:
        """Ranks cannot go on together: whoever waits for a result is told."""
        self._lost = message
        if "service" in self.__dict__:
            self.service.fail(RankError(message))

    @property
    def plan(self) -> Plan:
        """The plan that the model runs by."""
        return self.model.plan

    def submit(self, request: Request, *, priority: Priority = "interactive", stream: bool = False) -> Handle:
        """Let one request be completed. Raises InputError for one that cannot be, or is longer than was planned for."""
        index = request.index if priority == "batch" else 0
        prompt = self._encoded(request)
        return self.service.submit(prompt, request.sampling, priority=priority, index=index, stream=stream)

    def results(self, requests: Sequence[Request]) -> Iterator[Result]:
        """A result for each request, as they finish. On other ranks than 0 they come when all are there.

        Raises InputError before anything runs for requests that cannot be.
        """
        if self._control.world.is_main:
            return self._shared(lambda: self._finishing(requests))
        return iter(self._answer())

    def _finishing(self, requests: Sequence[Request]) -> Iterator[Result]:
        prompts = [self._encoded(request) for request in requests]
        finished: SimpleQueue[int] = SimpleQueue()
        asked = [
            Asked(prompt, request.sampling, request.index) for request, prompt in zip(requests, prompts, strict=True)
        ]
        handles = self.service.submit_all(asked, priority="batch")
        try:
            for number, handle in enumerate(handles):
                handle.when_changed(lambda number=number: finished.put(number))  # type: ignore[misc]
            progress = CallProgress(self.service, requests)
            for _ in requests:
                while (one := _next_of(finished)) is None:
                    self._observer.progress(progress.now())
                result = self.result(handles[one].result(), requests[one])
                progress.add(result)
                self._observer.progress(progress.now())
                yield result
        finally:
            for handle in handles:
                handle.cancel()

    def _shared(self, work: Callable[[], Iterator[Result]]) -> Iterator[Result]:
        """Yield what `work` does, which the other ranks get in the end."""
        if self._control.world.size == 1:
            yield from work()
            return
        self._calls += 1
        key, found = f"answer/{self._calls}", list[Result]()
        answer: Any = found
        try:
            for result in work():
                found.append(result)
                yield result
        except BaseException as error:
            code = error.exit_code if isinstance(error, ZeroinfError) else ZeroinfError.exit_code
            answer = OtherRankFailedError(str(error), code)
            raise
        finally:
            self._control.store.set(key, pickle.dumps(answer))  # type: ignore[arg-type]

    def _answer(self) -> list[Result]:
        """The results that rank 0 gave for this call."""
        self._calls += 1
        key = f"answer/{self._calls}"
        while not self._control.store.check([key]):
            self.service.check()
            time.sleep(_POLL_S)
        answer: list[Result] | OtherRankFailedError = pickle.loads(self._control.store.get(key))
        if isinstance(answer, OtherRankFailedError):
            raise answer
        return answer

    def _encoded(self, request: Request) -> array[int]:
        started = time.perf_counter()
        prompt = encode_prompt(self.model.codec, request)
        self._tokenize_s += time.perf_counter() - started
        config = self.model.engine.model.generation_config
        if not request.sampling.is_greedy and (why := refuse_sampling(config)):
            raise InputError(f"prompt {request.index}: {why}")
        try:
            check_lengths(self.plan, len(prompt), request.sampling)
        except InputError as error:
            raise InputError(f"prompt {request.index}: {error.message}", hint=error.hint) from error
        return array("i", prompt)

    def result(self, found: Completion, request: Request | Work) -> Result:
        """The result of `request`."""
        return result_of(request, found, self.model.codec)

    def report(self) -> RunReport:
        """What was done since the model was loaded, all ranks together, between two passes. On rank 0.

        Raises UsageError on other ranks and once the session is closed.
        """
        ranks: list[RankReport] = self.service.reports()  # type: ignore[assignment]
        done = self.service.tally
        return RunReport(
            plan=self.plan,
            requests=done.results - done.failed,
            refused=0,
            failed=done.failed,
            cut=done.cut,
            cut_answers=done.cut_answers,
            prompt_tokens=done.prompt_tokens,
            completion_tokens=done.completion_tokens,
            start_to_ready_s=self._ready_s,
            load_s=self.model.load_s,
            tokenize_s=self._tokenize_s,
            generate_s=max(rank.repetitions[0].generate_s for rank in ranks),
            start_to_finish_s=process_age_s(),
            streamed_bytes=streamed_by_all(ranks, in_step=self.model.engine.in_step),
            shared_host_bytes=self.model.engine.stats().shared_host_bytes,
            ranks=tuple(ranks),
            output=None,
            errors=None,
        )

    def close(self) -> None:
        """Free the model. Every rank must call it."""
        self._is_sound = not self.service.has_failed
        self._closing.close()

    def _leave(self) -> None:
        if self._is_sound:
            self._control.close()
        else:
            self._control.abort()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def open_session(
    options: RunOptions,
    lengths: Lengths | Callable[[ModelSource, Anatomy], Lengths],
    requests: int | None,
    observer: Observer,
    num_gpus: int | None = None,
) -> Session:
    """A session on this rank, or on `num_gpus` ranks that are started for it. `lengths` may need the model."""
    world, ranks = world_from_environment(), None
    device = pick_device(world)
    try:
        observer.doing("reading the model")
        source = source_of(options, device.type)
        anatomy = anatomy_of(options, source, device.type)
        if not isinstance(lengths, Lengths):
            lengths = lengths(source, anatomy)
        if num_gpus is not None:
            ranks = Ranks(num_gpus, SessionSpec(options, lengths, requests))
            world = ranks.world
        session = Session(options, source, anatomy, lengths, requests, world, device, observer, ranks)
    except BaseException:
        observer.ended()
        raise
    for note in notes(session.model.engine.model.generation_config, sampled=False) if world.is_main else ():
        warnings.warn(note, stacklevel=3)
    return session
