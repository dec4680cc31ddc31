"""A loaded model that answers many calls: what `zeroinf.pipeline` keeps open."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from types import TracebackType

import torch

from zeroinf.distributed.control import Control
from zeroinf.distributed.world import World
from zeroinf.engines.base import Silent
from zeroinf.engines.registry import load_engine
from zeroinf.engines.zero.config import build_zero_config
from zeroinf.errors import DoesNotFitError, InputError
from zeroinf.generation.cache import PagePool
from zeroinf.generation.loop import Feed, generate
from zeroinf.generation.micro_batch import Desk, TokenRules, breaks_at
from zeroinf.generation.row import Row
from zeroinf.generation.scheduler import Limits, Scheduler
from zeroinf.generation.settings import notes, refuse_sampling
from zeroinf.jobs.options import RunOptions
from zeroinf.jobs.planning import plan_run
from zeroinf.model.inspect import read_anatomy
from zeroinf.model.source import ModelSource, load_tokenizer, pick_dtype
from zeroinf.planner.workload import Lengths
from zeroinf.service.gpu_memory import GpuMemory
from zeroinf.service.requests import Request, Result
from zeroinf.service.text import TextCodec, encode_prompt


class Session:
    """An engine with its weights loaded and its cache allocated, for prompts and completions of up to `lengths`.

    Under a launcher every rank makes one, and calls `run` with the same requests: each runs all of them.
    """

    def __init__(
        self,
        options: RunOptions,
        source: ModelSource,
        lengths: Lengths,
        requests: int | None,
        world: World,
        device: torch.device,
    ) -> None:
        """Plan and load. Raises what a run raises before its first token."""
        self._device, self._lengths = device, lengths
        anatomy = read_anatomy(
            source.config,
            dtype=pick_dtype(options.dtype, source, device.type),
            trust_remote_code=options.trust_remote_code,
        )
        self.tokenizer = load_tokenizer(source)
        self._codec = TextCodec(self.tokenizer, anatomy)
        self._control = Control(world, device.type)
        if world.is_main:
            planned = plan_run(options, source, anatomy, lengths, requests, world, device.type)[:2]
        self.plan, own_config = self._control.broadcast(planned if world.is_main else None)
        self._part = self._control.part(self.plan.tensor_parallel.size)
        gpu = GpuMemory(self.plan, device, options.gpu_memory_bytes) if device.type == "cuda" else None
        if gpu is not None:
            gpu.check()
        config = own_config or build_zero_config(self.plan)
        try:
            self._engine = load_engine(self.plan, source, config, self._control, device, Silent())
            fits = self.plan if gpu is None else gpu.plan_that_fits()
            self._plan = fits.with_rows(min(self._part.gather(fits.batch_size)))
            self._pool = PagePool(self._engine.model, fits.rank_anatomy(world.rank), self._plan.pool, device)
        except torch.OutOfMemoryError as error:
            raise _does_not_fit(error) from error
        for note in notes(self._engine.model.generation_config, sampled=False):
            warnings.warn(note, stacklevel=2)

    def run(self, requests: Sequence[Request]) -> list[Result]:
        """A result for each request, in order. Raises InputError for one that is longer than was planned for, or than
        the model's context, before any of them runs."""
        waiting = [self._row(number, request) for number, request in enumerate(requests)]
        finished: dict[int, Result] = {}
        model, engine = self._engine.model, self._engine
        rules = TokenRules(model, self._codec.pad_token, self._codec.eos_tokens)
        limits = Limits.of(self._plan, shares_passes=engine.shares_passes, breaks_at=breaks_at(model.config))

        def take() -> list[Row]:
            return [waiting.pop(0) for _ in range(min(self._plan.batch_size, len(waiting)))]

        def done(row: Row) -> None:
            finished[row.index] = _result(row, requests[row.index])

        try:
            generate(
                engine,
                self._part if self.plan.tensor_parallel.size > 1 else self._control,
                Desk(model, rules, self._pool, self._device),
                Scheduler(limits, self._plan.anatomy.row_pages),
                Feed(take=take, done=done),
            )
        except torch.OutOfMemoryError as error:
            raise _does_not_fit(error) from error
        return [finished[number] for number in range(len(requests))]

    def _row(self, number: int, request: Request) -> Row:
        prompt = encode_prompt(self._codec, request)
        if not request.sampling.is_greedy and (why := refuse_sampling(self._engine.model.generation_config)):
            raise InputError(f"prompt {number}: {why}")
        for name, tokens, planned in (
            ("prompt", len(prompt), self._lengths.prompt_tokens),
            ("completion", request.sampling.max_new_tokens, self._lengths.new_tokens),
        ):
            if tokens > planned:
                raise InputError(
                    f"prompt {number}: a {name} of {tokens} tokens, but the plan was made for up to {planned}",
                    hint="make the pipeline with a larger max_prompt_tokens or max_new_tokens",
                )
        return Row(
            index=number,
            prompt=prompt,
            sampling=request.sampling,
            decode=self._codec.decode,
            piece=self._codec.piece,
        )

    def close(self) -> None:
        """Free the model. Every rank must call it."""
        self._engine.close()
        self._control.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _result(row: Row, request: Request) -> Result:
    assert row.finish_reason is not None
    return Result(
        index=row.index,
        id=request.id,
        prompt=request.prompt,
        completion=row.text,
        finish_reason=row.finish_reason,
        prompt_tokens=len(row.prompt),
        completion_tokens=len(row.generated),
    )


def _does_not_fit(error: torch.OutOfMemoryError) -> DoesNotFitError:
    return DoesNotFitError(
        f"out of GPU memory: {str(error).splitlines()[0]}", hint="choose a smaller batch_size or shorter prompts"
    )
