"""Executes one run from request to report. Every rank calls `run_job`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TextIO

import torch
import torch.distributed as dist

from zeroinf.distributed.control import Control
from zeroinf.distributed.waits import WaitWatch, report_long_wait
from zeroinf.distributed.watch import PeerWatch
from zeroinf.distributed.world import World
from zeroinf.engines.registry import descriptor_of
from zeroinf.errors import RankError
from zeroinf.generation.loop import Feed
from zeroinf.hardware.aio_op import read_aio_op
from zeroinf.hardware.process import PeakMemory, process_age_s, uncollected
from zeroinf.jobs.output import Job, Writer
from zeroinf.jobs.output_files import errors_path
from zeroinf.jobs.work_list import WorkList
from zeroinf.model.source import ModelSource
from zeroinf.options.model import source_of
from zeroinf.options.options import RunOptions
from zeroinf.planner.plan import Plan
from zeroinf.runs.interrupts import Interrupts, interrupted
from zeroinf.runs.measure import RankMeter, streamed_by_all
from zeroinf.runs.opening import open_job, outcome_of
from zeroinf.runs.prepare import JobInput, PreparedRun, prepare
from zeroinf.runs.report import RunOutcome, RunReport
from zeroinf.runs.request_feed import Output, RequestFeed, WarmUpFeed
from zeroinf.runs.shutdown import Shutdown
from zeroinf.service.loaded import LoadedModel
from zeroinf.service.observer import Observer
from zeroinf.service.phases import Phases
from zeroinf.service.requests import Refusal

_WARM_UP_TOKENS = 3


def run_job(
    options: RunOptions, world: World, device: torch.device, results: TextIO, observer: Observer
) -> RunOutcome | None:
    """Carry out one run. Every rank calls it; rank 0 gets the outcome, the others None.

    Results go to the options' output file, or to `results` where there is none. Raises a ZeroinfError; whatever was
    finished by then is saved, and a note says where and how to go on.
    """
    peak = PeakMemory()
    with Interrupts() as interrupts:
        with report_long_wait(f"all {world.size} ranks to start", observer.note):
            control = Control(world, device.type)
        waits = WaitWatch(control, observer.note, lambda message, speak: observer.failed(message) if speak else None)
        control.activity.now("reads the job and plans")
        start = _start_together(options, control, device, results, observer)
        output = Output(start.writer) if start.writer is not None else None
        shutdown = Shutdown(options.output_file, options.resume_command, output, observer, interrupts)
        waits.on_end = shutdown.on_deadlock
        report: RunReport | None = None
        failures: Sequence[Refusal] = ()
        try:
            if start.prepared is not None:
                shutdown.watch = PeerWatch(control, shutdown.on_peer_death) if world.size > 1 else None
                job = _Job(options, control, start.prepared, output, observer, interrupts)
                report = job.run(start.source, device, shutdown.watch, peak)
            control.activity.now("publishes the output")
            if output is not None:
                failures = output.finish()
        except BaseException as error:
            if isinstance(error, RankError):
                waits.defer_to_deadlock()
            waits.stop()
            shutdown.on_error(error)
            raise
        shutdown.finished()
        waits.stop()
        control.close()
    if start.job is None or output is None:
        return None
    return outcome_of(options, start.job, output, failures, report, observer)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Start:
    """The things that a rank begins with; `writer` and `job` are there on rank 0 only."""

    source: ModelSource
    prepared: PreparedRun | None
    """None where there is nothing to run: all is done, or refused."""
    writer: Writer | None = None
    job: Job | None = None


def _start_together(
    options: RunOptions, control: Control, device: torch.device, results: TextIO, observer: Observer
) -> _Start:
    """Rank 0 checks and plans; the others learn its answer, or that there is none."""
    started: list[_Start] = []

    def start() -> PreparedRun | None:
        started.append(_start(options, control.world, device.type, results, observer))
        prepared = started[0].prepared
        return None if prepared is None else replace(prepared, work=WorkList())

    prepared = control.run_on_main(start)
    mine = started[0] if started else _Start(source=source_of(options, device.type), prepared=prepared)
    if prepared is None:
        return mine
    own = mine.prepared.work if mine.prepared is not None else prepared.work
    return replace(mine, prepared=replace(prepared, work=own.shared(control)))


def _start(options: RunOptions, world: World, device: str, results: TextIO, observer: Observer) -> _Start:
    observer.doing("reading the model")
    source = source_of(options, device)

    def prepare_here(reading: JobInput, left: WorkList) -> PreparedRun:
        with uncollected():
            return prepare(options, source, reading, left, world, device, observer.note)

    opened = open_job(options, source, device, results, observer, prepare_here, world.size)
    return _Start(source=source, prepared=opened.prepared, writer=opened.writer, job=opened.job)


class _Job:
    """The part of a run that needs the model."""

    def __init__(
        self,
        options: RunOptions,
        control: Control,
        prepared: PreparedRun,
        output: Output | None,
        observer: Observer,
        interrupts: Interrupts,
    ) -> None:
        self._options = options
        self._control = control
        self._prepared = prepared
        self._output = output
        self._observer = observer
        self._interrupts = interrupts
        self._repetitions: list[Phases] = []

    def run(
        self, source: ModelSource, device: torch.device, watch: PeerWatch | None, peak: PeakMemory
    ) -> RunReport | None:
        plan, observer = self._prepared.plan, self._observer
        if self._prepared.engine_choice is not None:
            observer.note(f"{plan.engine} engine: {self._prepared.engine_choice}")
        if "aio" in descriptor_of(plan.engine).options and plan.offload == "nvme":
            self._tell_of_compiling(plan)
        model = LoadedModel(
            plan,
            source,
            self._control,
            device,
            observer,
            zero_config=self._prepared.zero_config,
            gpu_memory=self._options.gpu_memory,
            peak=peak,
        )
        try:
            ready_s = process_age_s()
            generate_s, meter = self._generate(model)
            finish_s = process_age_s()
            if watch is not None:
                watch.stop()
            stats = model.engine.stats()
            ranks = self._control.all_gather(meter.report(self._repetitions, model.peak.stop()))
            streamed = streamed_by_all(ranks, in_step=model.engine.in_step)
        finally:
            model.close()
        if self._output is None:
            return None
        return RunReport(
            plan=plan,
            requests=self._output.results - self._output.failed,
            refused=self._prepared.refused,
            failed=self._output.failed,
            cut=self._output.cut,
            cut_answers=self._output.cut_answers,
            prompt_tokens=self._output.prompt_tokens,
            completion_tokens=self._output.completion_tokens,
            start_to_ready_s=ready_s,
            load_s=model.load_s,
            tokenize_s=self._prepared.tokenize_s,
            generate_s=generate_s,
            start_to_finish_s=finish_s,
            streamed_bytes=streamed,
            shared_host_bytes=stats.shared_host_bytes,
            ranks=tuple(ranks),
            output=self._options.output_file,
            errors=errors_path(self._options.output_file) if self._options.output_file else None,
        )

    def _tell_of_compiling(self, plan: Plan) -> None:
        if not read_aio_op(with_gpu=plan.device == "cuda").usable_at_once:
            self._observer.note("DeepSpeed compiles its NVMe op on first use: this takes minutes, once")

    def _generate(self, model: LoadedModel) -> tuple[float, RankMeter]:
        """The seconds of the measured part, and what counted its passes."""
        if self._options.benchmark:
            warm_up = WarmUpFeed(self._prepared, model, min(_WARM_UP_TOKENS, self._prepared.plan.new_tokens))
            self._loop(model, Feed(take=warm_up.take, done=lambda row: None))
        for number in range(1, self._options.repetitions):
            self._run_once(number, model, None)
            self._control.all_gather(None)  # ranks begin together
        meter = RankMeter(model)
        return self._run_once(0, model, self._output), meter

    def _run_once(self, number: int, model: LoadedModel, output: Output | None) -> float:
        """All requests, from a queue of its own, and the seconds they take. Without `output` only the time counts."""
        store = dist.PrefixStore(f"repetition/{number}", self._control.store)
        model.scheduler.clear_prefixes()  # nothing is known of these requests
        stream = RequestFeed(self._prepared, model, store, output, self._observer)
        self._observer.doing("first pass over the layers")
        try:
            self._loop(model, Feed(take=stream.take, done=stream.done, grew=stream.grew))
            self._repetitions.append(stream.phases())
            stream.gather_all()
            generate_s = stream.finish()
        finally:
            stream.gather()
            self._observer.ended()
        return generate_s

    def _loop(self, model: LoadedModel, feed: Feed) -> None:
        self._interrupts.deferred = True
        try:
            stopped_by = model.run(replace(feed, stop_requested=lambda: self._interrupts.requested))
        finally:
            self._interrupts.deferred = False
            self._control.activity.now("has generated its tokens")
        if stopped_by:
            raise interrupted(stopped_by)
