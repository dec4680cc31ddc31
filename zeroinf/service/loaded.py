"""A loaded model: its engine, its KV cache, the guard of its GPU memory, and the generation loop.

Everything that a run, a session or an evaluation takes of the machine is acquired here in one order and released in the
reverse order, even after a failure: page-locked memory, GPU memory and its limit, process groups, and environment
variables. Where rows come from and where results go is the caller's task.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import replace
from typing import Any

import torch

from zeroinf.distributed.control import Control
from zeroinf.engines.base import Engine
from zeroinf.engines.loading import load_engine
from zeroinf.errors import DoesNotFitError
from zeroinf.generation.cache import PagePool
from zeroinf.generation.graphs import CudaCapturing, Graphs
from zeroinf.generation.host_cache import HostCache
from zeroinf.generation.loop import Feed, generate
from zeroinf.generation.micro_batch import BatchState, TokenRules, breaks_at
from zeroinf.generation.pass_limits import Limits
from zeroinf.generation.prompts import decoder_start
from zeroinf.generation.row import Decode, Row, Sampling
from zeroinf.generation.scheduler import Scheduler
from zeroinf.generation.scoring import ScoreBatch, Scored, Scorer, batches_of
from zeroinf.hardware.cgroup import read_cgroup_processors
from zeroinf.hardware.measure.link_rates import measure_own_link
from zeroinf.hardware.numa import gpu_node, own_processors
from zeroinf.hardware.process import PeakMemory, Resident
from zeroinf.hardware.processors import attention_processors
from zeroinf.model.inspect import find_stacks
from zeroinf.model.source import ModelSource
from zeroinf.model.tokenizer import load_tokenizer
from zeroinf.planner.graphs import MOST_GRAPHS, graph_sizes
from zeroinf.planner.memory import MASKS
from zeroinf.planner.plan import Plan
from zeroinf.service.environment import Environment
from zeroinf.service.gpu_memory import GpuMemory, GpuUse
from zeroinf.service.observer import Observer
from zeroinf.service.text import TextCodec
from zeroinf.service.warm_up import WarmUp
from zeroinf.sizes import Share, count_text
from zeroinf.structured.matcher import AnswerState, Vocabulary


class LoadedModel:
    """A model that is loaded once, for rows up to the lengths of its plan.

    Every rank opens one, and closes it. `control` stays the caller's.
    """

    def __init__(
        self,
        plan: Plan,
        source: ModelSource,
        control: Control,
        device: torch.device,
        observer: Observer,
        *,
        zero_config: dict[str, Any] | None = None,
        gpu_memory: int | Share | None = None,
        peak: PeakMemory | None = None,
    ) -> None:
        """Take the GPU, load the weights and make room for keys and values.

        `gpu_memory` is the most that this rank may take of its GPU. `peak` watches this process's memory already.
        Raises DoesNotFitError where the plan no longer fits, and what engines raise of damaged weights and lost ranks;
        nothing is left behind then.
        """
        self.control, self.device = control, device
        self.peak = PeakMemory() if peak is None else peak
        self._observer = observer
        self._gpu: GpuMemory | None = None
        self._host: HostCache | None = None
        self.link_gbps: float | None = None
        """Rate of this rank's link, measured before the weights were loaded; None where nothing crosses one."""
        self._told_of_graphs = ""
        self._closing = ExitStack()
        try:
            self._closing.callback(self.peak.stop)
            environment = Environment()
            self._closing.callback(environment.restore)
            observer.loading(plan)
            self._take_gpu(plan, gpu_memory)
            warm_up = WarmUp(plan, source, device) if device.type == "cuda" else None
            with closing(warm_up) if warm_up is not None else nullcontext():
                self._load(plan, source, zero_config)
                observer.doing("allocating the KV cache")
                self._make_room(plan, source)
                if warm_up is not None:
                    self._wait_for(warm_up)
            environment.note()
            observer.ended()
        except BaseException:
            observer.ended()
            self.close()
            raise

    def _wait_for(self, warm_up: WarmUp) -> None:
        self._observer.doing("compiling kernels")
        if problem := warm_up.wait():
            self._observer.note(f"some kernels will be compiled at their first use, not while loading: {problem}")

    def _take_gpu(self, plan: Plan, limit: int | Share | None) -> None:
        """Start on the GPU: limit, link, and a look at whether the plan still holds."""
        if self.device.type != "cuda":
            return
        self._gpu = GpuMemory(plan, self.device, limit)
        self._closing.callback(self._gpu.close)
        self._gpu.check()
        if plan.offload != "none" or plan.host is not None:
            self.control.all_gather(None)  # all ranks at once, as they will stream
            self.link_gbps = measure_own_link(self.device.index)
            torch.cuda.reset_peak_memory_stats(self.device)

    def _load(self, plan: Plan, source: ModelSource, zero_config: dict[str, Any] | None) -> None:
        started = time.perf_counter()
        self.control.activity.now("loads weights")
        try:
            self.engine: Engine = load_engine(plan, source, zero_config, self.control, self.device, self._observer)
        except torch.OutOfMemoryError as error:
            raise DoesNotFitError(
                f"out of GPU memory while weights were loaded: {str(error).splitlines()[0]}",
                hint="another process may have taken some; run it again, and it plans with what is free then",
            ) from error
        self._closing.callback(self._drop)
        self._closing.callback(self.engine.close)
        self.load_s = time.perf_counter() - started
        self.control.activity.now("generates")
        self._observer.loaded(self.load_s)
        self.loading: Resident = self.peak.so_far()
        """Resident memory of this process at its highest until weights were loaded."""

    def _make_room(self, planned: Plan, source: ModelSource) -> None:
        plan = planned if self._gpu is None else self._gpu.plan_that_fits()
        self.part = self.control.subgroup(plan.tensor_parallel.size)
        """The channel among the ranks that hold this model together: alone, or all that run the same rows."""
        fitting = min(self.part.all_gather(plan.batch_size))  # ranks of one stream run the same rows
        self.plan = plan = plan.with_rows(fitting) if fitting < plan.batch_size else plan
        if plan.batch_size < planned.batch_size:
            self._observer.note(
                f"another process has taken GPU memory since the plan: batch {plan.batch_size} instead of "
                f"{planned.batch_size}"
            )
        engine, model = self.engine, self.engine.model
        self.codec = TextCodec(load_tokenizer(source), plan.anatomy)
        self._start = decoder_start(model) if plan.anatomy.encoder is not None else None
        rules = TokenRules(model, self.codec.pad_token, self.codec.eos_tokens)
        self.pad_token = rules.pad_token
        self._vocabulary = Vocabulary(
            self.codec.piece, plan.anatomy.vocabulary, self.codec.special_tokens, rules.eos_tokens
        )
        if any(term.name == MASKS for term in plan.terms):
            self._vocabulary.read_ahead()
        self.stops = rules.stops
        """Stop strings of the model's generation config."""
        processors = processors_of(self.control, self.device) if planned.host is not None else ()
        limits = Limits.of(plan, shares_passes=engine.shares_passes, breaks_at=breaks_at(model.config))
        try:
            pool = PagePool(model, plan.rank_anatomy(self.control.world.rank), plan.pool, self.device)
            if plan.host is not None:
                pin = plan.pin_memory and self.device.type == "cuda"
                self._host = HostCache(
                    model, plan.anatomy, plan.host, self.device, engine.link_stream, pin=pin, processors=processors
                )
                self._closing.callback(self._host.close)
            self._batch_state = BatchState(model, rules, pool, self.device, self._host)
        except torch.OutOfMemoryError as error:
            raise _out_of_memory(error, plan.batch_size) from error
        self._graphs: Graphs | None = None
        if plan.graph_tokens and self.device.type == "cuda":
            self._graphs = Graphs(
                [block for _, stack in find_stacks(model) for block in stack],
                CudaCapturing(self.device, getattr(torch, plan.dtype)),
                graph_sizes(plan.graph_tokens),
                most=MOST_GRAPHS,
                launched=[module for _, module in self._batch_state.mixers],
            )
        self.scheduler = Scheduler(limits, plan.anatomy.row_pages)
        self._scorer = Scorer(model, rules.pad_token, self.device, packs=plan.packs_scores and limits.breaks_at is None)

    def row(self, prompt: Sequence[int], sampling: Sampling, *, index: int = 0, urgent: bool = False) -> Row:
        """A row that completes `prompt`. `index` tells its random numbers from those of rows with the same seed."""
        asked = sampling.answer_format
        given, source = (prompt, ()) if self._start is None else ((self._start,), prompt)
        return Row(
            index=index,
            prompt=given,
            source=source,
            sampling=sampling,
            decode=self._decode(sampling),
            piece=self.codec.piece,
            urgent=urgent,
            answer=None if asked is None else AnswerState(self._vocabulary, asked),
        )

    def _decode(self, sampling: Sampling) -> Decode:
        """The function that makes text of the tokens of a row."""
        if sampling.answer_format is not None:
            return self.codec.decode_as_it_is
        return self.codec.decode if sampling.skip_special_tokens else self.codec.decode_all

    @property
    def shares_scores(self) -> bool:
        """Whether continuations of several tokens share what they follow, and nothing is padded, in scoring."""
        return self._scorer.packs

    def score_batches(self, sequences: Sequence[Scored]) -> Iterator[ScoreBatch]:
        """`sequences` in forwards as large as the plan has memory for."""
        limits = self.scheduler.limits
        return batches_of(
            self._scorer,
            sequences,
            rows=limits.micro_batch_rows,
            columns=limits.score_tokens or limits.prefill_tokens,
            kept=self.plan.scored_tokens,
            breaks_at=limits.breaks_at,
        )

    def run(self, feed: Feed) -> int:
        """The loop over the rows of `feed`, until it has no more or asks to stop; see `zeroinf.generation.loop`.

        Raises DoesNotFitError where a pass with a single row runs out of GPU memory.
        """
        control = self.part if self.plan.tensor_parallel.size > 1 else self.control
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # threads have one each
        try:
            return generate(
                self.engine, control, self._batch_state, self.scheduler, replace(feed, shrank=self._tell_of_shrinking)
            )
        except torch.OutOfMemoryError as error:
            raise _out_of_memory(error, self.scheduler.limits.micro_batch_rows) from error
        finally:
            if self._graphs is not None and self._graphs.refused != self._told_of_graphs:
                self._told_of_graphs = self._graphs.refused
                self._observer.note(f"layers ran without CUDA graphs: {self._told_of_graphs}")

    def _tell_of_shrinking(self, limits: Limits) -> None:
        """An error of the planner: say so, with what it had counted on."""
        terms = ", ".join(f"{t.name} {t.nbytes / 2**30:.2f} GiB" for t in self.plan.terms if t.place == "gpu")
        rows, tokens = limits.micro_batch_rows, limits.forward_tokens or limits.prefill_tokens
        most = f"{rows} sequence{'s' * (rows > 1)}" + f" and {tokens:,} tokens" * (not limits.together)
        most += f", {limits.score_tokens:,} where they are scored" * bool(limits.score_tokens)
        self._observer.note(
            f"out of GPU memory, although the plan fits: the pass is repeated with forwards of at most {most}. Please "
            f"report this with the planned terms: {terms}"
        )

    @property
    def moved_bytes(self) -> tuple[int, int]:
        """Keys and values that have crossed the link to the GPU, and from it."""
        return (self._host.link.fetched_bytes, self._host.link.sent_bytes) if self._host is not None else (0, 0)

    @property
    def attention_s(self) -> float:
        """Seconds that the CPU has attended to keys and values in host memory."""
        return self._host.steps.seconds if self._host is not None and self._host.steps is not None else 0.0

    @property
    def attention_wait_s(self) -> float:
        """Seconds that the host has waited for attention on the CPU, with nothing else to enqueue."""
        return self._host.steps.waited_s if self._host is not None and self._host.steps is not None else 0.0

    @property
    def mask_wait_s(self) -> float:
        """Seconds that passes have waited for the masks of structured answers."""
        return self._batch_state.masks.waited_s

    @property
    def pinned_host_bytes(self) -> int:
        """Host memory that this rank has page-locked, what it shares with others included."""
        host = self._host.pinned_bytes if self._host is not None else 0
        return self.engine.stats().pinned_host_bytes + host

    def gpu_use(self) -> GpuUse | None:
        """Memory that was taken of the GPU until now; None without one."""
        if self._gpu is None:
            return None
        staging = self._host.link.staging_bytes if self._host is not None else 0
        return self._gpu.use(self.engine.stats().slot_bytes, self._batch_state.pool.nbytes + staging)

    def close(self) -> None:
        """Give everything back. No loop may run."""
        self._closing.close()

    def _drop(self) -> None:
        """Let go of what holds device memory."""
        for name in ("_batch_state", "_scorer", "_graphs", "engine"):
            self.__dict__.pop(name, None)
        self._host = None
        gc.collect()  # hooks and the models that they belong to refer to each other


def processors_of(control: Control, device: torch.device) -> tuple[int, ...]:
    """The processors that attend for this rank. Every rank calls it at once: they tell each other what they may use,
    and which NUMA node their GPU is connected to."""
    world = control.world
    node = world.rank - world.local_rank
    own = gpu_node(device.index or 0) if device.type == "cuda" else None
    on_node = [one for of, *one in control.all_gather((node, own_processors(), own)) if of == node]
    allowed, gpu_nodes = zip(*on_node, strict=True)
    return attention_processors(world.local_rank, allowed, read_cgroup_processors(), gpu_nodes=gpu_nodes)


def _out_of_memory(error: torch.OutOfMemoryError, rows: int) -> DoesNotFitError:
    return DoesNotFitError(
        f"out of GPU memory with {count_text(rows, 'row', 'rows')}: {str(error).splitlines()[0]}",
        hint="shorten the prompts, lower --max-new-tokens, or keep fewer layers on the GPU (--resident-blocks)"
        if rows == 1
        else "choose a smaller --batch-size",
    )
