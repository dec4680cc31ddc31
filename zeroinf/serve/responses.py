"""Answers that take long: the client hears something now and then, and when it leaves, the work for it ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any, Literal

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from zeroinf.serve.errors import ApiError
from zeroinf.serve.wire import event, json_bytes

_TYPES = {"json": b"application/json", "events": b"text/event-stream; charset=utf-8"}
_HEARTBEATS = {"json": b"\n", "events": b": ping\n\n"}


class LiveResponse(Response):
    """Sends what `body` yields, with a heartbeat whenever it is silent for `heartbeat_s` seconds.

    An ApiError before the first byte keeps its status; a later one is told in the body. `body` is closed when all is
    sent or the client has left, whichever comes first.
    """

    def __init__(self, body: AsyncGenerator[bytes, None], form: Literal["json", "events"], heartbeat_s: float) -> None:
        self._body, self._form, self._heartbeat_s = body, form, heartbeat_s
        self._begun = False
        self.background = None
        self.status_code = 200

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.create_task(_until_gone(receive))
        following: asyncio.Task[bytes] | None = None
        try:
            while True:
                following = following or asyncio.create_task(anext(self._body))
                done, _ = await asyncio.wait(
                    {gone, following}, timeout=self._heartbeat_s, return_when=asyncio.FIRST_COMPLETED
                )
                if gone in done:
                    return
                if not done:
                    await self._send(send, _HEARTBEATS[self._form])
                    continue
                try:
                    chunk = following.result()
                except StopAsyncIteration:
                    break
                except Exception as error:
                    await self._tell(error, scope, receive, send)
                    return
                following = None
                await self._send(send, chunk)
            await self._send(send, b"", last=True)
        except OSError:  # the client left while something was sent
            return
        finally:
            gone.cancel()
            if following is not None:
                following.cancel()
                with suppress(BaseException):
                    await following
            await self._body.aclose()

    async def _tell(self, error: Exception, scope: Scope, receive: Receive, send: Send) -> None:
        told = ApiError.of(error)
        if not self._begun:
            await JSONResponse(told.to_json(), told.status, dict(told.headers))(scope, receive, send)
            return
        await self._send(send, event(told.to_json()) if self._form == "events" else json_bytes(told.to_json()))
        await self._send(send, b"", last=True)

    async def _send(self, send: Send, data: bytes, *, last: bool = False) -> None:
        if not self._begun:
            self._begun = True
            headers = [(b"content-type", _TYPES[self._form]), (b"cache-control", b"no-store")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": data, "more_body": not last})


async def _until_gone(receive: Receive) -> None:
    while True:
        message: Any = await receive()
        if message["type"] == "http.disconnect":
            return
