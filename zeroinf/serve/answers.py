"""Completions on their way to a client: one body, or a stream of chunks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Any

from zeroinf.jobs.envelope import Envelope, chat_logprobs, text_logprobs
from zeroinf.serve.asks import Ask
from zeroinf.serve.gateway import Gateway
from zeroinf.serve.wire import DONE, event, json_bytes
from zeroinf.service.handles import Handle, TokenEvent
from zeroinf.service.requests import Extra, Request, Result
from zeroinf.service.text import TextCodec


async def whole(gateway: Gateway, ask: Ask, handles: Sequence[Handle]) -> AsyncGenerator[bytes, None]:
    """The body of the answer, once all of it is there."""
    codec, parts = gateway.codec, [list[TokenEvent]() for _ in handles]
    try:
        async for number, heard in _merged(gateway, handles):
            parts[number].append(heard)
        choices = [
            _result(codec, ask, request, handle, events)
            for request, handle, events in zip(ask.requests, handles, parts, strict=True)
        ]
        body = Envelope(gateway.settings.model_name, ask.created).body(choices)
        yield json_bytes({**body, "id": ask.id})
    finally:
        gateway.let_go(handles)


async def chunks(gateway: Gateway, ask: Ask, handles: Sequence[Handle]) -> AsyncGenerator[bytes, None]:
    """The events of a stream, as tokens come."""
    codec, writers = gateway.codec, [_Chunks(gateway, ask, one) for one in ask.requests]
    generated = 0
    try:
        async for number, heard in _merged(gateway, handles):
            generated += len(heard.tokens)
            for choice in writers[number].of(codec, heard):
                yield event(_chunk(gateway, ask, [choice]))
        if ask.tells_usage:
            prompts = sum(
                handle.prompt_tokens
                for handle, request in zip(handles, ask.requests, strict=True)
                if (request.extra or Extra()).first
            )
            usage = {
                "prompt_tokens": prompts,
                "completion_tokens": generated,
                "total_tokens": prompts + generated,
            }
            yield event(_chunk(gateway, ask, []) | {"usage": usage})
        yield DONE
    finally:
        gateway.let_go(handles)


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


def _result(codec: TextCodec, ask: Ask, request: Request, handle: Handle, events: Sequence[TokenEvent]) -> Result:
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
        logprobs=list(map(codec.told, found.tokens, found.likelihoods)) if tells else None,
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

    def __init__(self, gateway: Gateway, ask: Ask, request: Request) -> None:
        self._ask, self._request = ask, request
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
        if text or told or heard.finish_reason is not None:
            found.append(self._choice({"text": text}, text_logprobs(told, self._characters), heard.finish_reason))
            self._characters += sum(len(one["token"]) for one in told or ())
        return found

    def _choice(self, said: dict[str, Any], logprobs: object, finish_reason: str | None) -> dict[str, Any]:
        return {"index": self._index, **said, "logprobs": logprobs, "finish_reason": finish_reason}
