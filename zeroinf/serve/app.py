"""The routes of a server: OpenAI's models and completions, vLLM's token routes, health, figures and the page."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.routing import Match, Route

import zeroinf
from zeroinf.jobs.foreign import Endpoint
from zeroinf.serve.answers import chunks, whole
from zeroinf.serve.asks import check_model, read_ask, read_object
from zeroinf.serve.description import describe
from zeroinf.serve.errors import ApiError
from zeroinf.serve.gateway import Gateway
from zeroinf.serve.guard import Guard
from zeroinf.serve.responses import LiveResponse
from zeroinf.serve.tokens import detokenized, tokenized, tokenizer_info


def make_app(gateway: Gateway, *more: Callable[[FastAPI, Gateway], None]) -> FastAPI:
    """The server's application. Each of `more` adds routes of its own."""
    settings = gateway.settings
    app = FastAPI(
        title="zeroinf",
        version=zeroinf.__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=settings.hosts, www_redirect=False),
            Middleware(Guard, settings=settings),
        ],
    )
    describe(app, needs_key=settings.api_key is not None)
    _tell_errors(app)
    _add_completions(app, gateway)
    _add_models(app, gateway)
    _add_tokens(app, gateway)
    _add_state(app, gateway)
    for add in more:
        add(app, gateway)
    return app


def _tell_errors(app: FastAPI) -> None:
    async def api(request: Request, error: Exception) -> Response:
        told = ApiError.of(error)
        return JSONResponse(told.to_json(), told.status, dict(told.headers))

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, StarletteHTTPException)
        code = {404: f"there is nothing at {request.url.path}", 405: f"{request.method} is not for {request.url.path}"}
        told = ApiError(error.status_code, code.get(error.status_code, str(error.detail)))
        headers = {**(error.headers or {}), **told.headers}
        if error.status_code == 405:
            headers["Allow"] = ", ".join(_methods_at(app, request))
        return JSONResponse(told.to_json(), told.status, headers)

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        name = str(first["loc"][-1])
        return await api(request, ApiError(400, f"{name}: {first['msg']}", param=name))

    app.add_exception_handler(ApiError, api)
    app.add_exception_handler(StarletteHTTPException, http)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(Exception, api)


def _methods_at(app: FastAPI, request: Request) -> list[str]:
    """Methods that the path of a request has, of all its routes."""
    found = set[str]()
    for route in app.routes:
        if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE:
            found |= route.methods or set()
    return sorted(found)


async def json_of(request: Request) -> bytes:
    """The body of a request that says that it is JSON. Raises ApiError."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "the body must be JSON, with Content-Type: application/json")
    return await request.body()


def _add_completions(app: FastAPI, gateway: Gateway) -> None:
    async def complete(request: Request, endpoint: Endpoint) -> Response:
        raw = await json_of(request)
        settings = gateway.settings
        _ = gateway.service  # say first that there is none
        # In a thread: large bodies and grammars take their time, and others are answered meanwhile.
        ask = await asyncio.to_thread(read_ask, raw, endpoint, settings.model_name, gateway.defaults)
        prompts = await asyncio.to_thread(lambda: [gateway.tokens_of(one) for one in ask.requests])
        submitted = gateway.submit(ask, prompts)
        body = (chunks if ask.is_streamed else whole)(gateway, submitted)
        return LiveResponse(body, "events" if ask.is_streamed else "json", settings.heartbeat_s)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        """Answer a chat."""
        return await complete(request, "chat")

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        """Complete prompts."""
        return await complete(request, "completions")


def _add_models(app: FastAPI, gateway: Gateway) -> None:
    def described() -> dict[str, Any]:
        return {
            "id": gateway.settings.model_name,
            "object": "model",
            "created": int(gateway.started),
            "owned_by": "zeroinf",
            "max_model_len": gateway.max_model_len,
        }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The model that is served."""
        return {"object": "list", "data": [described()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """The model of that name."""
        check_model(name, gateway.settings.model_name)
        return described()


def _add_tokens(app: FastAPI, gateway: Gateway) -> None:
    @app.post("/tokenize")
    async def tokenize(request: Request) -> dict[str, Any]:
        """Token ids of a prompt or a chat."""
        body = read_object(await json_of(request))
        return await asyncio.to_thread(tokenized, gateway, body)

    @app.post("/detokenize")
    async def detokenize(request: Request) -> dict[str, Any]:
        """The text of token ids."""
        body = read_object(await json_of(request))
        return await asyncio.to_thread(detokenized, gateway, body)

    @app.get("/tokenizer_info")
    async def info() -> dict[str, Any]:
        """Special tokens and chat template of the tokenizer."""
        return tokenizer_info(gateway)


def _add_state(app: FastAPI, gateway: Gateway) -> None:
    @app.get("/health")
    async def health() -> Response:
        """200 once the model is loaded, 503 before and when the server stops."""
        state = gateway.state
        return JSONResponse({"status": state}, 200 if state == "ready" else 503)

    @app.get("/version")
    async def version() -> dict[str, str]:
        """zeroinf's version."""
        return {"version": zeroinf.__version__}

    @app.get("/metrics")
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(gateway.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
