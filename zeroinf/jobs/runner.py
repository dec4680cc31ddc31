"""One run from request to report, on every rank."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TextIO

import psutil
import torch
import torch.distributed as dist

from zeroinf.distributed.control import Control
from zeroinf.distributed.waits import WaitWatch, announced
from zeroinf.distributed.watch import PeerWatch
from zeroinf.distributed.world import World
from zeroinf.engines.base import Engine, EngineStats, Stalls
from zeroinf.engines.registry import load_engine
from zeroinf.errors import (
    DoesNotFitError,
    EnvironmentProblem,
    RankError,
    RequestsFailedError,
    ZeroinfError,
)
from zeroinf.generation.cache import PagePool
from zeroinf.generation.host_cache import HostCache
from zeroinf.generation.loop import Feed, generate
from zeroinf.generation.micro_batch import Desk, TokenRules, breaks_at
from zeroinf.generation.row import Row
from zeroinf.generation.scheduler import Counts, Limits, Scheduler
from zeroinf.hardware.aio_op import read_aio_op
from zeroinf.hardware.measure.links import measure_own_link
from zeroinf.hardware.process import PeakMemory, Resident
from zeroinf.jobs.interrupts import Interrupts, interrupted
from zeroinf.jobs.leaving import Leaving, reason_of
from zeroinf.jobs.observer import Observer
from zeroinf.jobs.options import RunOptions
from zeroinf.jobs.output import Job, JournalOutput, PairsOutput, Writer, errors_path, journal_path
from zeroinf.jobs.planning import choose_engine
from zeroinf.jobs.prepare import Prepared, none_can_run, prepare, read_job
from zeroinf.jobs.report import Outcome, Phases, RankReport, RunReport
from zeroinf.jobs.stream import Output, Stream, WarmUp
from zeroinf.model.source import ModelSource, load_tokenizer, resolve_model
from zeroinf.planner.plan import Plan
from zeroinf.planner.traits import needs_full_weights
from zeroinf.service.gpu_memory import GpuMemory
from zeroinf.service.requests import Refusal
from zeroinf.service.text import TextCodec

_WARM_UP_TOKENS = 3


class OtherRankFailedError(ZeroinfError):
    """Rank 0 has said what is wrong; this rank only leaves, in silence and with the same exit code."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("")
        self.exit_code = exit_code


def pick_device(world: World) -> torch.device:
    """This rank's GPU, or the CPU where there is none or DeepSpeed's own DS_ACCELERATOR=cpu asks for it.

    The GPU is not touched: what is free on it is planned with.

    Raises EnvironmentProblem when there are GPUs, but fewer than ranks.
    """
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if world.local_rank >= torch.cuda.device_count():
        raise EnvironmentProblem(
            f"local rank {world.local_rank} has no GPU: this machine shows {torch.cuda.device_count()}",
            hint="start fewer ranks, or check CUDA_VISIBLE_DEVICES",
        )
    return torch.device("cuda", world.local_rank)


def run_job(
    options: RunOptions, world: World, device: torch.device, results: TextIO, observer: Observer
) -> Outcome | None:
    """Carry out one run. Every rank calls it; rank 0 gets the outcome, the others None.

    Results go to the options' output file, or to `results` where there is none. Raises a ZeroinfError; whatever was
    finished by then is saved, and a note says where and how to go on.
    """
    peak = PeakMemory()
    with Interrupts() as interrupts:
        with announced(f"all {world.size} ranks to start", observer.note):
            control = Control(world, device.type)
        waits = WaitWatch(control, observer.note, lambda message, speak: observer.failed(message) if speak else None)
        control.place.now("reads the job and plans")
        start = _start_together(options, control, device, results, observer)
        output = Output(start.writer) if start.writer is not None else None
        leaving = Leaving(options.output_file, options.resume_command, output, observer, interrupts)
        waits.on_end = leaving.in_deadlock
        report: RunReport | None = None
        failures: Sequence[Refusal] = ()
        try:
            if start.prepared is not None:
                leaving.watch = PeerWatch(control, leaving.with_the_dead) if world.size > 1 else None
                job = _Job(options, control, device, start.source, start.prepared, output, observer, interrupts, peak)
                report = job.run(leaving.watch)
            control.place.now("publishes the output")
            if output is not None:
                failures = output.finish()
        except BaseException as error:
            if isinstance(error, RankError):
                waits.defer_to_deadlock()
            waits.stop()
            leaving.because_of(error)
            raise
        leaving.finished()
        waits.stop()
        control.close()
    if start.job is None:
        return None
    if not start.job.work:
        where = f"see {errors_path(options.output_file)}" if options.output_file is not None else None
        raise RequestsFailedError(none_can_run(start.job.refusals), hint=where)
    done = len(start.job.work) - len(failures)
    if done:  # else they have failed as one, and the command line says so once
        observer.left_out("failed", failures)
    return Outcome(requests=done, refused=len(start.job.refusals), failed=len(failures), report=report)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Start:
    """What a rank begins with; `writer` and `job` are there on rank 0 only."""

    source: ModelSource
    prepared: Prepared | None
    """None where there is nothing to run: all is done, or refused."""
    writer: Writer | None = None
    job: Job | None = None


def _start_together(
    options: RunOptions, control: Control, device: torch.device, results: TextIO, observer: Observer
) -> _Start:
    """Rank 0 checks and plans; the others learn its answer, or that there is none."""
    if control.world.is_main:
        try:
            start = _start(options, control.world, device.type, results, observer)
        except ZeroinfError as error:
            control.broadcast(error.exit_code)
            raise
        control.broadcast(start.prepared)
        return start
    answer = control.broadcast(None)
    if isinstance(answer, int):
        raise OtherRankFailedError(answer)
    return _Start(source=_resolve(options), prepared=answer)


def _start(options: RunOptions, world: World, device: str, results: TextIO, observer: Observer) -> _Start:
    source = _resolve(options)
    reading = read_job(options, source, device)
    job = reading.job
    observer.left_out("refused", job.refusals)
    for note in reading.notes:
        observer.note(note)
    writer = _open_output(options, job, results, observer)
    try:
        if job.work and not writer.left:
            observer.note(f"all {len(job.work)} requests were done by earlier runs")
            return _Start(source=source, prepared=None, writer=writer, job=job)
        prepared = prepare(options, source, reading, tuple(writer.left), world, device) if job.work else None
        writer.begin(world.size)
        _check_error_rate(options, job)
    except BaseException as error:
        writer.abandon(reason_of(error))
        raise
    return _Start(source=source, prepared=prepared, writer=writer, job=job)


def _open_output(options: RunOptions, job: Job, results: TextIO, observer: Observer) -> Writer:
    if options.output_file is None:
        return PairsOutput(results, job.work)
    output = JournalOutput(
        options.output_file,
        job,
        overwrite=options.overwrite,
        resume=options.resume,
        resume_anyway=options.resume_anyway,
    )
    done = len(job.work) - len(output.left)
    if output.damaged:
        observer.note(f"{output.damaged} lines of {journal_path(options.output_file)} are damaged: they are done again")
    if options.resume and job.work:
        observer.note(f"going on with {done} of {len(job.work)} results" if done else "nothing to resume: a new job")
    if output.changed:
        observer.note(f"results of two jobs in one output, which differ in {', '.join(output.changed)}")
    return output


def _check_error_rate(options: RunOptions, job: Job) -> None:
    refused, count = len(job.refusals), len(job.refusals) + len(job.work)
    if refused / count > options.max_error_rate:
        where = f"see {errors_path(options.output_file)}" if options.output_file else "their reasons stand above"
        raise RequestsFailedError(
            f"{refused} of {count} requests were refused, more than --max-error-rate {options.max_error_rate:g}",
            hint=f"{where}; nothing was run",
        )


def _resolve(options: RunOptions) -> ModelSource:
    engine, _ = choose_engine(options.engine, own_zero_config=options.zero_config is not None)
    return resolve_model(
        options.model,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
        random_weights=options.random_weights,
        in_full=needs_full_weights(engine, options.wire),
    )


@dataclass(frozen=True, slots=True)
class _Room:
    """The KV cache, on the GPU and in host memory, and who shares it out."""

    pool: PagePool
    host: HostCache | None
    scheduler: Scheduler

    @property
    def gpu_bytes(self) -> int:
        return self.pool.nbytes + (self.host.link.staging_bytes if self.host is not None else 0)

    @property
    def moved_bytes(self) -> tuple[int, int]:
        """Keys and values that have crossed the link to the GPU, and from it."""
        return (self.host.link.fetched_bytes, self.host.link.sent_bytes) if self.host is not None else (0, 0)


class _Job:
    """The part of a run that needs the model."""

    def __init__(
        self,
        options: RunOptions,
        control: Control,
        device: torch.device,
        source: ModelSource,
        prepared: Prepared,
        output: Output | None,
        observer: Observer,
        interrupts: Interrupts,
        peak: PeakMemory,
    ) -> None:
        self._options = options
        self._control = control
        self._device = device
        self._source = source
        self._prepared = prepared
        self._output = output
        self._observer = observer
        self._interrupts = interrupts
        self._peak = peak
        self._stalls_before = Stalls()
        self._repetitions: list[Phases] = []
        self._part = control.part(prepared.plan.tensor_parallel.size)
        self._gpu: GpuMemory | None = None
        self._room: _Room | None = None
        self._moved_before = (0, 0)
        self._link_gbps: float | None = None

    def run(self, watch: PeerWatch | None) -> RunReport | None:
        plan = self._prepared.plan
        self._observer.loading(plan)
        if self._prepared.engine_choice is not None:
            self._observer.note(f"{plan.engine} engine: {self._prepared.engine_choice}")
        if plan.engine == "zero" and plan.offload == "nvme":
            self._tell_of_compiling(plan)
        if self._device.type == "cuda":
            self._take_gpu()
        started = time.perf_counter()
        self._control.place.now("loads weights")
        engine = self._load()
        try:
            load_s, ready_s = time.perf_counter() - started, process_age_s()
            self._observer.loaded(load_s)
            loading = self._peak.so_far()
            self._control.place.now("generates")
            room = self._room = self._make_room(engine)
            stream, generate_s = self._generate(engine, room)
            finish_s = process_age_s()
            if watch is not None:
                watch.stop()
            ranks = self._control.gather(self._rank_report(engine.stats(), room, stream, loading))
            # In step, the ranks of one pass share one walk over the weights; otherwise each makes its own.
            streamed = (max if engine.in_step else sum)(rank.streamed_bytes for rank in ranks)
            stats = engine.stats()
        finally:
            if self._room is not None and self._room.host is not None:
                self._room.host.close()
            engine.close()
        if self._output is None:
            return None
        return RunReport(
            plan=plan,
            requests=self._output.results - self._output.failed,
            refused=self._prepared.refused,
            failed=self._output.failed,
            prompt_tokens=self._output.prompt_tokens,
            completion_tokens=self._output.completion_tokens,
            start_to_ready_s=ready_s,
            load_s=load_s,
            tokenize_s=self._prepared.tokenize_s,
            generate_s=generate_s,
            start_to_finish_s=finish_s,
            streamed_bytes=streamed,
            shared_host_bytes=stats.shared_host_bytes,
            ranks=tuple(ranks),
            output=self._options.output_file,
            errors=errors_path(self._options.output_file) if self._options.output_file else None,
        )

    def _take_gpu(self) -> None:
        """Start on the GPU: limit, link, and a look at whether the plan still holds."""
        plan = self._prepared.plan
        self._gpu = GpuMemory(plan, self._device, self._options.gpu_memory_bytes)
        self._gpu.check()
        if plan.offload != "none" or plan.host is not None:
            self._control.gather(None)  # all ranks at once, as they will stream
            self._link_gbps = measure_own_link(self._device.index)
            torch.cuda.reset_peak_memory_stats(self._device)

    def _load(self) -> Engine:
        prepared = self._prepared
        try:
            return load_engine(
                prepared.plan, self._source, prepared.zero_config, self._control, self._device, self._observer
            )
        except torch.OutOfMemoryError as error:
            raise DoesNotFitError(
                f"out of GPU memory while weights were loaded: {str(error).splitlines()[0]}",
                hint="another process may have taken some; run it again, and it plans with what is free then",
            ) from error

    def _tell_of_compiling(self, plan: Plan) -> None:
        if not read_aio_op(with_gpu=plan.device == "cuda").usable_at_once:
            self._observer.note("DeepSpeed compiles its NVMe op on first use: this takes minutes, once")

    def _generate(self, engine: Engine, room: _Room) -> tuple[Stream, float]:
        codec = TextCodec(load_tokenizer(self._source), self._prepared.plan.anatomy)
        rules = TokenRules(engine.model, codec.pad_token, codec.eos_tokens)
        desk, scheduler = Desk(engine.model, rules, room.pool, self._device, room.host), room.scheduler
        if self._options.benchmark:
            warm_up = WarmUp(self._prepared, codec, engine, min(_WARM_UP_TOKENS, self._prepared.plan.new_tokens))
            self._loop(engine, desk, scheduler, warm_up.take, lambda row: None, lambda rows: None)
        for number in range(1, self._options.repetitions):
            self._run_once(number, engine, desk, scheduler, codec, None)
            self._control.gather(None)  # ranks begin together
        scheduler.counts = Counts()
        self._stalls_before, self._moved_before = engine.stats().stalls, room.moved_bytes
        return self._run_once(0, engine, desk, scheduler, codec, self._output)

    def _run_once(
        self, number: int, engine: Engine, desk: Desk, scheduler: Scheduler, codec: TextCodec, output: Output | None
    ) -> tuple[Stream, float]:
        """All requests, from a queue of its own. Without `output` only the time counts."""
        store = dist.PrefixStore(f"repetition/{number}", self._control.store)
        stream = Stream(self._prepared, codec, self._part, store, engine, output, self._observer)
        try:
            self._loop(engine, desk, scheduler, stream.take, stream.done, stream.grew)
            self._repetitions.append(stream.phases())
            stream.gather_all()
            generate_s = stream.finish()
        finally:
            stream.gather()
            self._observer.ended()
        return stream, generate_s

    def _make_room(self, engine: Engine) -> _Room:
        planned = self._prepared.plan
        plan = planned if self._gpu is None else self._gpu.plan_that_fits()
        fitting = min(self._part.gather(plan.batch_size))  # ranks of one stream run the same rows
        plan = plan.with_rows(fitting) if fitting < plan.batch_size else plan
        if plan.batch_size < planned.batch_size:
            self._observer.note(
                f"another process has taken GPU memory since the plan: {plan.batch_size} rows instead of "
                f"{planned.batch_size}"
            )
        limits = Limits.of(plan, shares_passes=engine.shares_passes, breaks_at=breaks_at(engine.model.config))
        try:
            pool = PagePool(engine.model, plan.rank_anatomy(self._control.world.rank), plan.pool, self._device)
            host = None
            if plan.host is not None:
                pin = plan.pin_memory and self._device.type == "cuda"
                host = HostCache(engine.model, plan.anatomy, plan.host, self._device, engine.link_stream, pin=pin)
        except torch.OutOfMemoryError as error:
            raise _out_of_memory(error, plan.batch_size) from error
        return _Room(pool, host, Scheduler(limits, plan.anatomy.row_pages))

    def _loop(
        self,
        engine: Engine,
        desk: Desk,
        scheduler: Scheduler,
        take: Callable[[], Sequence[Row]],
        done: Callable[[Row], None],
        grew: Callable[[int], None],
    ) -> None:
        feed = Feed(
            take=take,
            done=done,
            grew=grew,
            stop_requested=lambda: self._interrupts.requested,
            shrank=self._tell_of_shrinking,
        )
        self._interrupts.deferred = True
        try:
            control = self._part if self._prepared.plan.tensor_parallel.size > 1 else self._control
            stopped_by = generate(engine, control, desk, scheduler, feed)
        except torch.OutOfMemoryError as error:
            raise _out_of_memory(error, scheduler.limits.micro_batch_rows) from error
        finally:
            self._interrupts.deferred = False
            self._control.place.now("has generated its tokens")
        if stopped_by:
            raise interrupted(stopped_by)

    def _tell_of_shrinking(self, rows: int) -> None:
        """An error of the planner: say so, with what it had counted on."""
        terms = ", ".join(f"{t.name} {t.nbytes / 2**30:.2f} GiB" for t in self._prepared.plan.terms if t.place == "gpu")
        self._observer.note(
            f"out of GPU memory, against the plan: micro-batches of {rows} row{'s' * (rows > 1)} from here on, "
            "the pass is made again. "
            f"Please report it with the planned terms: {terms}"
        )

    def _rank_report(self, stats: EngineStats, room: _Room, stream: Stream, loading: Resident) -> RankReport:
        fetched, sent = (now - before for now, before in zip(room.moved_bytes, self._moved_before, strict=True))
        return RankReport(
            host_loading=loading,
            host=self._peak.stop(),
            gpu=self._gpu.use(stats.slot_bytes, room.gpu_bytes) if self._gpu is not None else None,
            link_gbps=self._link_gbps,
            passes=stream.passes,
            streamed_bytes=stream.streamed_bytes,
            counts=room.scheduler.counts,
            pool_pages=room.scheduler.limits.pages,
            kv_fetched_bytes=fetched,
            kv_sent_bytes=sent,
            slot_bytes=stats.slot_bytes,
            pinned_host_bytes=stats.pinned_host_bytes + (room.host.pinned_bytes if room.host is not None else 0),
            stalls=stats.stalls - self._stalls_before,
            repetitions=tuple(self._repetitions),
        )


def _out_of_memory(error: torch.OutOfMemoryError, rows: int) -> DoesNotFitError:
    return DoesNotFitError(
        f"out of GPU memory with {'1 row' if rows == 1 else f'{rows} rows'}: {str(error).splitlines()[0]}",
        hint="shorten the prompts, lower --max-new-tokens, or let fewer blocks stay on the GPU"
        if rows == 1
        else "choose a smaller --batch-size",
    )


def process_age_s() -> float:
    """Seconds since this process was started: imports and all."""
    return time.time() - psutil.Process(os.getpid()).create_time()
