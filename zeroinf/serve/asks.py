"""Parses the JSON body of a client's request: the requests to run, and the form in which their answers are sent."""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Any

from zeroinf.errors import EnvironmentProblem
from zeroinf.generation.row import Sampling
from zeroinf.jobs.entries import parse_object
from zeroinf.jobs.foreign import Endpoint
from zeroinf.jobs.readers import read_requests
from zeroinf.jobs.shape import LineError
from zeroinf.serve.errors import ApiError
from zeroinf.service.requests import Extra, Request

PATHS: dict[Endpoint, str] = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
_STREAM_OPTIONS = ("include_usage", "include_obfuscation")


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """One call: a request for each completion, in the order of its choices."""

    id: str
    created: int
    """Seconds since 1970."""
    endpoint: Endpoint
    requests: tuple[Request, ...]
    is_streamed: bool
    tells_usage: bool
    """A stream ends with the token counts."""
    scores_prompts: bool = False
    """The answer begins with the log-probabilities of the prompt's tokens."""


def read_object(raw: bytes) -> dict[str, Any]:
    """The JSON object in a body. Raises ApiError."""
    try:
        return parse_object(raw.decode())
    except UnicodeDecodeError:
        raise ApiError(400, "the body is not UTF-8") from None
    except LineError as error:
        raise ApiError(400, f"the body is no request: {error}") from None


def read_ask(raw: bytes, endpoint: Endpoint, model_name: str, defaults: Sampling) -> Ask:
    """Read `raw`, the body of a call of `endpoint`. `defaults` holds for what it leaves out.

    Sampled requests without a seed get one by chance. Raises ApiError for what is wrong with it, or not done here.
    """
    body = read_object(raw)
    is_streamed = _flag(body, "stream")
    tells_usage = _usage_wanted(body.pop("stream_options", None), is_streamed)
    check_model(body.get("model"), model_name)
    scores_prompts = endpoint == "completions" and _prompt_scores_wanted(body)
    name = secrets.token_hex(12)
    line = {"custom_id": name, "method": "POST", "url": PATHS[endpoint], "body": {**body, "model": model_name}}
    source = BytesIO(json.dumps(line).encode())
    try:
        requests, refusals = read_requests((), source, defaults, input_format="jsonl", name="the body")
    except EnvironmentProblem as error:
        raise ApiError(400, f"{error}, which the server lacks", param="response_format") from None
    if refusals:
        raise ApiError(400, refusals[0].reason, param=next((key for key in body if key in refusals[0].reason), None))
    if scores_prompts:
        requests = [replace(one, extra=replace(one.extra or Extra(), echo=True)) for one in requests]
    if body.get("seed") is None and not requests[0].sampling.is_greedy:
        seed = secrets.randbits(31)
        requests = [replace(one, sampling=replace(one.sampling, seed=seed)) for one in requests]
    return Ask(
        id=f"{'chatcmpl' if endpoint == 'chat' else 'cmpl'}-{name}",
        created=int(time.time()),
        endpoint=endpoint,
        requests=tuple(requests),
        is_streamed=is_streamed,
        tells_usage=tells_usage,
        scores_prompts=scores_prompts,
    )


def check_model(named: object, served: str) -> None:
    """Raises ApiError where a request names another model than the one that is served."""
    if named is not None and named != served:
        raise ApiError(404, f"there is no model {named!r}: this server has {served!r}", code="model_not_found")


def _flag(body: dict[str, Any], name: str) -> bool:
    value = body.pop(name, None)
    if value is not None and not isinstance(value, bool):
        raise ApiError(400, f"{name} must be true or false, not {value!r}", param=name)
    return bool(value)


def _prompt_scores_wanted(body: dict[str, Any]) -> bool:
    """Whether `echo` and `logprobs` stand together; takes `echo` out of `body` then."""
    logprobs = body.get("logprobs")
    if body.get("echo") is not True or logprobs is None or logprobs is False:
        return False
    if logprobs not in (0, 1):
        raise ApiError(
            400, f"logprobs={logprobs!r} with echo: of a prompt's tokens the likeliest one is told: ask for 1 or 0",
            param="logprobs",
        )  # fmt: skip
    del body["echo"]
    return True


def _usage_wanted(options: object, is_streamed: bool) -> bool:
    if options is None:
        return False
    if not is_streamed:
        raise ApiError(400, "stream_options needs stream=true", param="stream_options")
    if not isinstance(options, dict) or any(
        key not in _STREAM_OPTIONS or not isinstance(value, bool) for key, value in options.items()
    ):
        raise ApiError(400, "stream_options takes include_usage, true or false", param="stream_options")
    return bool(options.get("include_usage"))
