"""The one model of a server: whether it is ready, what it takes in, and what is under way.

Interactive requests come in here, from the event loop of the server; batches have a window of their own
(`zeroinf.serve.batches`). Nothing here knows of HTTP but the errors that clients are told.
"""

from __future__ import annotations

import math
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Literal

from prometheus_client.core import Metric

from zeroinf.errors import InputError, ZeroinfError
from zeroinf.generation.row import Sampling
from zeroinf.generation.scoring import TokenScores
from zeroinf.generation.settings import refuse_sampling
from zeroinf.serve.asks import Ask
from zeroinf.serve.errors import ApiError
from zeroinf.serve.metrics import Metrics, counter, gauge, labelled
from zeroinf.serve.settings import Settings
from zeroinf.service.core import Asked, Service
from zeroinf.service.handles import Handle, TokenEvent
from zeroinf.service.loaded import LoadedModel
from zeroinf.service.requests import Request
from zeroinf.service.text import TextCodec

State = Literal["loading", "ready", "draining", "failed"]
_MOST_RETRY_S = 120
"""OpenAI's client gives up where it is told to wait longer."""
_RETRY_S = 5


@dataclass(frozen=True, slots=True)
class Submitted:
    """The completions of a call on their way, in the order of its requests."""

    ask: Ask
    prompts: Sequence[Sequence[int]]
    """Token ids."""
    handles: Sequence[Handle]
    scores: Sequence[Future[TokenScores] | None]
    """Of each prompt's tokens but the first, where they were asked for."""


class Gateway:
    """Takes completions for the model of a server and follows them."""

    def __init__(self, settings: Settings, defaults: Sampling) -> None:
        """`defaults` holds for what requests leave out."""
        self.settings, self.defaults = settings, defaults
        self.started = time.time()
        self.why: BaseException | None = None
        """The error that ended it."""
        self.metrics = Metrics(self._read)
        self.batch_requests = 0
        """Of batches, those under way."""
        self._state: State = "loading"
        self._service: Service | None = None
        self._live: set[Handle] = set()
        self._begun: set[Handle] = set()
        self._last_s = 0.0
        """How long a completion took lately."""

    @property
    def state(self) -> State:
        if self._state == "ready" and self._service is not None and self._service.has_failed:
            return "failed"
        return self._state

    def open(self, service: Service) -> None:
        """The model is loaded."""
        self._service = service
        if self._state == "loading":
            self._state = "ready"

    def drain(self) -> None:
        """Take nothing more."""
        self._state = "draining"

    def fail(self, error: BaseException) -> None:
        """There will be no model."""
        self.why, self._state = error, "failed"

    @property
    def service(self) -> Service:
        """Raises ApiError while there is none, or where it takes nothing."""
        state = self.state
        if state == "ready" and self._service is not None:
            return self._service
        words = {
            "loading": "the model is being loaded",
            "draining": "the server is stopping",
            "failed": "the model has failed; the server's log says why",
        }
        raise ApiError(503, words.get(state, state), code=state, retry_after_s=_RETRY_S)

    @property
    def codec(self) -> TextCodec:
        return self.service.model.codec

    @property
    def model(self) -> LoadedModel | None:
        """The model that was loaded, also while nothing more is taken in."""
        return None if self._service is None else self._service.model

    @property
    def kv_cache_usage(self) -> float:
        """Share of the KV cache's pages in use, on rank 0."""
        if (model := self.model) is None:
            return 0.0
        return model.scheduler.reserved_pages / max(1, model.scheduler.limits.pages)

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and completion."""
        plan = self.service.model.plan
        return min(plan.prompt_tokens + plan.new_tokens, plan.anatomy.context_limit or 1 << 62)

    @property
    def under_way(self) -> int:
        """Interactive completions."""
        return len(self._live)

    def tokens_of(self, request: Request) -> list[int]:
        """The prompt's token ids. Raises ApiError for a request that cannot be run."""
        service, sampling = self.service, request.sampling
        try:
            ids = service.model.codec.tokens(request)
            check_room(service, len(ids), sampling)
            whole = replace(request, tokens=tuple(ids), prompt=None, messages=None, truncate=None)
            ids = service.model.codec.encode(whole)
        except (ValueError, InputError) as error:
            raise ApiError(400, str(error)) from None
        config = service.model.engine.model.generation_config
        if not sampling.is_greedy and (why := refuse_sampling(config)):
            raise ApiError(400, why, param="temperature")
        return ids

    def submit(self, ask: Ask, prompts: Sequence[Sequence[int]]) -> Submitted:
        """Let all of `ask` be completed, and its prompts be scored where it wants that. Raises ApiError where too much
        is under way, or where nothing was planned for scores.
        """
        service, most = self.service, self.settings.max_queue
        if ask.scores_prompts and not service.model.plan.scored_tokens:
            raise ApiError(
                400,
                "echo with logprobs takes memory that this server has not planned: start it with --prompt-logprobs",
                param="echo",
            )
        if len(prompts) > most:
            raise ApiError(400, f"{len(prompts)} completions in one call, and the server takes {most}")
        if len(self._live) + len(prompts) > most:
            wait = min(_MOST_RETRY_S, max(1, math.ceil(self._last_s)))
            raise ApiError(429, f"{len(self._live)} completions are under way already", retry_after_s=wait)
        asked = [
            Asked(prompt, request.sampling, request.index)
            for request, prompt in zip(ask.requests, prompts, strict=True)
        ]
        handles = service.submit_all(asked, stream=True)
        self._live.update(handles)
        scores: dict[tuple[int, ...], Future[TokenScores]] = {}
        if ask.scores_prompts:  # completions of one prompt share them; a single token has none
            own = {tuple(prompt): [*prompt] for prompt in prompts if len(prompt) > 1}
            scores = dict(zip(own, service.score([(prompt, 1) for prompt in own.values()]), strict=True))
        return Submitted(ask, prompts, handles, [scores.get(tuple(prompt)) for prompt in prompts])

    async def follow(self, handle: Handle) -> AsyncGenerator[TokenEvent, None]:
        """Its events. Where nobody listens to the end, it is cancelled. Raises ApiError where it comes to nothing."""
        watch, began = self.metrics.watch(handle.prompt_tokens), time.monotonic()
        try:
            async for event in handle:
                self._begun.add(handle)
                watch.heard(len(event.tokens), event.finish_reason)
                if event.finish_reason == "error":
                    raise ApiError(500, event.problem or "the model's scores were not numbers")
                if event.finish_reason == "cancelled":
                    raise ApiError(503, "the server is stopping", retry_after_s=_RETRY_S)
                yield event
            self._last_s = time.monotonic() - began
        except ZeroinfError as error:
            raise ApiError.of(error) from error
        finally:
            self.let_go([handle])

    def drop(self, submitted: Submitted) -> None:
        """Nobody wants more of a call."""
        for future in filter(None, submitted.scores):
            future.cancel()
        self.let_go(submitted.handles)

    def let_go(self, handles: Sequence[Handle]) -> None:
        """Nobody wants more of them."""
        for handle in handles:
            handle.cancel()
        self._live.difference_update(handles)
        self._begun.difference_update(handles)

    def cancel_all(self) -> None:
        """End what is under way."""
        for handle in tuple(self._live):
            handle.cancel()

    def _read(self) -> Iterator[Metric]:
        """Figures of this moment."""
        running, waiting = self.load()
        yield gauge("num_requests_running", "Completions whose tokens are being made.", running)
        yield gauge("num_requests_waiting", "Completions that wait for room.", waiting)
        if self._state != "ready" or self._service is None:
            return
        model = self._service.model
        stats, plan = model.engine.stats(), model.plan
        yield gauge("kv_cache_usage_ratio", "Share of the KV cache's pages in use.", self.kv_cache_usage)
        shared = model.scheduler.counts.shared_tokens
        yield counter("prefix_cache_hits", "Prompt tokens that shared prefixes saved, on rank 0.", shared)
        yield counter("passes", "Walks over all layers, on rank 0.", stats.passes)
        yield counter("streamed_bytes", "Weights transferred to where they compute, on rank 0.", stats.streamed_bytes)
        counts = model.scheduler.counts
        computed: dict[tuple[str, ...], float] = {
            ("prefill",): counts.prefill_columns,
            ("decode",): counts.decode_columns,
        }
        padding: dict[tuple[str, ...], float] = {
            ("prefill",): counts.prefill_padding,
            ("decode",): counts.decode_padding,
        }
        text = "Columns that forwards computed or attended to"
        yield labelled("columns", f"{text}, on rank 0.", ["phase"], computed, counts=True)
        yield labelled("padding_columns", f"{text} and that held no token.", ["phase"], padding, counts=True)
        terms: dict[tuple[str, ...], float] = {}
        for term in plan.terms:
            terms[term.place, term.name] = terms.get((term.place, term.name), 0) + term.nbytes
        yield labelled("memory_bytes", "Planned memory, by place and term.", ["place", "term"], terms)
        if plan.timing is not None:
            yield gauge("plan_tokens_per_second", "Planned rate, all streams.", plan.timing.tokens_per_second)

    def load(self) -> tuple[int, int]:
        """Completions, those of batches included, that run and that wait."""
        everything = len(self._live) + self.batch_requests
        if self._service is None or self._state == "failed":
            return 0, everything
        plan, scheduler = self._service.model.plan, self._service.model.scheduler
        rows = plan.batch_size * plan.streams
        running = plan.batch_size - scheduler.free_rows if plan.streams == 1 else min(rows, everything)
        running = min(running, everything)
        return running, everything - running


def check_room(service: Service, prompt: int, sampling: Sampling) -> None:
    """Raises ApiError where a prompt of so many tokens and its completion are longer than the server is made for."""
    plan, new = service.model.plan, sampling.max_new_tokens
    for what, tokens, most, flag in (
        ("the prompt", prompt, plan.prompt_tokens, "--max-prompt-tokens"),
        ("the completion", new, plan.new_tokens, "--max-new-tokens"),
    ):
        if tokens > most:
            raise ApiError(
                400,
                f"{what} may have {most} tokens on this server, not {tokens}: start it with {flag} {tokens}",
                code="context_length_exceeded",
            )
    limit = plan.anatomy.context_limit
    if limit is not None and plan.anatomy.positions(prompt, new) > limit:
        raise ApiError(
            400,
            f"the model's context holds {limit} tokens, and the prompt has {prompt} and the completion up to {new}",
            code="context_length_exceeded",
        )
