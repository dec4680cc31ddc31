"""Guards a server: API keys, requests from pages of other sites, and the size of bodies.

Pages of other sites cannot use a server without a key through a visitor's browser: a request that names another origin
is refused, and bodies of JSON must say that they are JSON, which a browser does not let other pages do unasked.
"""

from __future__ import annotations

import hmac
import secrets
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from zeroinf.serve.errors import ApiError
from zeroinf.serve.settings import Settings

OPEN_PATHS = frozenset({"/", "/page.js", "/health"})
"""Those that tell nothing of anybody's work: the page asks for a key itself."""
_FORM_BYTES = 1 << 16
"""What a form adds to its file."""


class Guard:
    """ASGI middleware around everything else. Gives each answer an `x-request-id`."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app, self._settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = f"req_{secrets.token_hex(12)}".encode()

        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
            await send(message)

        try:
            self._check(scope, headers)
        except ApiError as error:
            await JSONResponse(error.to_json(), error.status, dict(error.headers))(scope, receive, tell)
            return
        await self._app(scope, self._limited(scope, receive), tell)

    def _check(self, scope: Scope, headers: Headers) -> None:
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != headers.get("host"):
            raise ApiError(403, "requests from pages of other sites are refused")
        key = self._settings.api_key
        if key is not None and scope["path"] not in OPEN_PATHS:
            kind, _, given = headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), key.encode()):
                raise ApiError(401, "no API key, or a wrong one", code="invalid_api_key")
        size = headers.get("content-length", "0")
        if size.isdecimal() and int(size) > (most := self._most(scope)):
            raise ApiError(413, f"the body has {size} bytes, and may have {most}")

    def _most(self, scope: Scope) -> int:
        settings = self._settings
        return settings.max_file_bytes + _FORM_BYTES if scope["path"] == "/v1/files" else settings.max_body_bytes

    def _limited(self, scope: Scope, receive: Receive) -> Receive:
        most, seen = self._most(scope), 0

        async def limited() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > most:
                raise ApiError(413, f"the body has more than {most} bytes")
            return message

        return limited
