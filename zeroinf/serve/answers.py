"""Completions on their way to a client: one body, or a stream of chunks."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Any

from zeroinf.errors import ZeroinfError
from zeroinf.generation.scoring import TokenScores
from zeroinf.jobs.envelope import Envelope, chat_logprobs, text_logprobs
from zeroinf.serve.asks import Ask
from zeroinf.serve.errors import ApiError
from zeroinf.serve.gateway import Gateway, Submitted
from zeroinf.serve.wire import DONE, event, json_bytes
from zeroinf.service.handles import Handle, TokenEvent
from zeroinf.service.requests import Extra, Request, Result
from zeroinf.service.text import TextCodec


async def whole(gateway: Gateway, submitted: Submitted) -> AsyncGenerator[bytes, None]:
    """The body of the answer, once all of it is there."""
    codec, ask, handles = gateway.codec, submitted.ask, submitted.handles
    parts = [list[TokenEvent]() for _ in handles]
    try:
        prompts = await _prompt_logprobs(codec, submitted)
        async for number, heard in _merged(gateway, handles):
            parts[number].append(heard)
        choices = [
            _result(codec, ask, request, handle, events, before)
            for request, handle, events, before in zip(ask.requests, handles, parts, prompts, strict=True)
        ]
        body = Envelope(gateway.settings.model_name, ask.created).body(choices)
        yield json_bytes({**body, "id": ask.id})
    finally:
        gateway.drop(submitted)


async def chunks(gateway: Gateway, submitted: Submitted) -> AsyncGenerator[bytes, None]:
    """The events of a stream, as tokens come."""
    codec, ask, handles = gateway.codec, submitted.ask, submitted.handles
    generated = 0
    try:
        prompts = await _prompt_logprobs(codec, submitted)
        writers = [_Chunks(ask, request, before) for request, before in zip(ask.requests, prompts, strict=True)]
        async for number, heard in _merged(gateway, handles):
            generated += len(heard.tokens)
            for choice in writers[number].of(codec, heard):
                yield event(_chunk(gateway, ask, [choice]))
        if ask.tells_usage:
            prompt_tokens = sum(
                handle.prompt_tokens
                for handle, request in zip(handles, ask.requests, strict=True)
                if (request.extra or Extra()).first
            )
            usage = {
                "prompt_tokens": prompt_tokens,
                "completion_tokens": generated,
                "total_tokens": prompt_tokens + generated,
            }
            yield event(_chunk(gateway, ask, []) | {"usage": usage})
        yield DONE
    finally:
        gateway.drop(submitted)


async def _prompt_logprobs(codec: TextCodec, submitted: Submitted) -> list[list[dict[str, Any]]]:
    """The tokens of each request's prompt as the answer tells them; empty where nobody asked."""
    found = list[list[dict[str, Any]]]()
    scores: TokenScores | None
    for prompt, future in zip(submitted.prompts, submitted.scores, strict=True):
        if not submitted.ask.scores_prompts:
            found.append([])
            continue
        try:
            scores = None
            if future is not None:
                scores = await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if future is None or not future.cancelled() or not _is_wanted():
                raise
            raise ApiError(503, "the server is stopping", retry_after_s=1) from None
        except ZeroinfError as error:
            raise ApiError.of(error) from error
        if scores is not None and any(map(math.isnan, scores.logprobs)):
            raise ApiError(500, "the model's scores were not numbers")
        found.append(codec.told_prompt(prompt, scores))
    return found


def _is_wanted() -> bool:
    """Whether this task itself was not cancelled."""
    task = asyncio.current_task()
    return task is not None and not task.cancelling()


async def _merged(gateway: Gateway, handles: Sequence[Handle]) -> AsyncGenerator[tuple[int, TokenEvent], None]:
    """The events of several completions, each with the number of its own, as they come."""
    heard: asyncio.Queue[tuple[int, TokenEvent | None, Exception | None]] = asyncio.Queue()

    async def listen(number: int, handle: Handle) -> None:
        error: Exception | None = None
        try:
            async for one in gateway.follow(handle):
                heard.put_nowait((number, one, None))
        except Exception as raised:
            error = raised
        heard.put_nowait((number, None, error))

    tasks = [asyncio.create_task(listen(number, handle)) for number, handle in enumerate(handles)]
    try:
        left = len(handles)
        while left:
            number, one, error = await heard.get()
            if error is not None:
                raise error
            if one is None:
                left -= 1
            else:
                yield number, one
    finally:
        for task in tasks:
            task.cancel()


def _result(
    codec: TextCodec,
    ask: Ask,
    request: Request,
    handle: Handle,
    events: Sequence[TokenEvent],
    before: list[dict[str, Any]],
) -> Result:
    found = handle.result(0)
    tells = request.sampling.logprobs is not None
    return Result(
        index=request.index,
        id=ask.id,
        prompt=_prompt_text(codec, request),
        completion="".join(one.text for one in events),
        finish_reason=found.finish_reason,
        prompt_tokens=handle.prompt_tokens,
        completion_tokens=len(found.tokens),
        logprobs=[*before, *map(codec.told, found.tokens, found.likelihoods)] if tells else None,
        extra=replace(request.extra or Extra(), endpoint=ask.endpoint),
    )


def _prompt_text(codec: TextCodec, request: Request) -> str | None:
    return request.prompt if request.tokens is None else codec.decode_all(request.tokens)


def _chunk(gateway: Gateway, ask: Ask, choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": ask.id,
        "object": "chat.completion.chunk" if ask.endpoint == "chat" else "text_completion",
        "created": ask.created,
        "model": gateway.settings.model_name,
        "choices": choices,
        **({"usage": None} if ask.tells_usage else {}),
    }


class _Chunks:
    """The choices of one completion's chunks."""

    def __init__(self, ask: Ask, request: Request, before: list[dict[str, Any]]) -> None:
        """`before`: the tokens of the prompt, where the answer tells them."""
        self._ask, self._request, self._before = ask, request, before
        self._index = (request.extra or Extra()).choice or 0
        self._begun, self._characters = False, 0

    def of(self, codec: TextCodec, heard: TokenEvent) -> list[dict[str, Any]]:
        told = None
        if self._request.sampling.logprobs is not None:
            told = list(map(codec.told, heard.tokens, heard.likelihoods))
        found = []
        first, self._begun = not self._begun, True
        if self._ask.endpoint == "chat":
            if first:
                found.append(self._choice({"delta": {"role": "assistant", "content": ""}}, None, None))
            if heard.text or told:
                found.append(self._choice({"delta": {"content": heard.text}}, chat_logprobs(told), None))
            if heard.finish_reason is not None:
                found.append(self._choice({"delta": {}}, None, heard.finish_reason))
            return found
        text = heard.text
        if first and (self._request.extra or Extra()).echo:
            text = (_prompt_text(codec, self._request) or "") + text
            if told is not None:
                told = [*self._before, *told]
        if text or told or heard.finish_reason is not None:
            found.append(self._choice({"text": text}, text_logprobs(told, self._characters), heard.finish_reason))
            self._characters += sum(len(one["token"]) for one in told or ())
        return found

    def _choice(self, said: dict[str, Any], logprobs: object, finish_reason: str | None) -> dict[str, Any]:
        return {"index": self._index, **said, "logprobs": logprobs, "finish_reason": finish_reason}
