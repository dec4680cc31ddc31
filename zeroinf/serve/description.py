"""Describes the server's routes in OpenAPI, as far as the routes' signatures do not: JSON bodies, answers and errors.

Bodies come from the request's definition (`zeroinf.jobs.fields`), so that a key that is added there is described here.
Rules between keys, and lengths that depend on the model, have no place in a schema: they are checked and told with 400.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from zeroinf.generation.row import MOST_LOGPROBS
from zeroinf.jobs.fields import Body
from zeroinf.jobs.foreign import HARMLESS, NEUTRAL, Endpoint

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string", "minLength": 1}
_TOKENS: Schema = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_OBJECT: Schema = {"type": "object"}
_INTEGER: Schema = {"type": "integer"}
_FLAG: Schema = {"type": "boolean"}


def _nullable(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _object(required: tuple[str, ...] = (), **properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(required or properties)}


_LENGTH: Schema = {"type": "integer", "minimum": 1}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_PENALTY: Schema = {"type": "number", "minimum": -2, "maximum": 2}
_WRITTEN: dict[str, Schema] = {
    "prompt": {"anyOf": [_TEXT, _TOKENS, {"type": "array", "items": {"anyOf": [_TEXT, _TOKENS]}, "minItems": 1}]},
    "messages": {
        "type": "array",
        "minItems": 1,
        "items": {
            **_object(
                ("role", "content"),
                role={"enum": ["system", "developer", "user", "assistant"]},
                content={
                    "anyOf": [
                        {"type": "string"},
                        {"type": "array", "items": _object(type={"const": "text"}, text={"type": "string"})},
                    ]
                },
                name=_nullable(_TEXT),
            ),
        },
    },
    **dict.fromkeys(("max_tokens", "max_new_tokens", "max_completion_tokens", "truncate_prompt_tokens"), _LENGTH),
    **dict.fromkeys(("min_tokens", "min_new_tokens"), _COUNT),
    "temperature": {"type": "number", "minimum": 0, "maximum": 100},
    "top_p": {"type": "number", "minimum": 0, "maximum": 1},
    "top_k": {"type": "integer", "minimum": -1},
    "min_p": {"type": "number", "minimum": 0, "maximum": 1},
    "n": {"type": "integer", "minimum": 1, "maximum": 128},
    "stop": {"anyOf": [_TEXT, {"type": "array", "items": _TEXT}]},
    **dict.fromkeys(("presence_penalty", "frequency_penalty"), _PENALTY),
    "repetition_penalty": {"type": "number", "exclusiveMinimum": 0, "maximum": 100},
    "logit_bias": {
        "type": "object",
        "propertyNames": {"pattern": "^[0-9]+$"},
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    },
    "logprobs": {"anyOf": [_FLAG, {"type": "integer", "minimum": 0, "maximum": MOST_LOGPROBS}]},
    "top_logprobs": {"type": "integer", "minimum": 0, "maximum": MOST_LOGPROBS},
    "stop_token_ids": {"type": "array", "items": {"type": "integer", "minimum": 0}},
}
"""Keys that are more, or less, than the types of their fields say."""
_ONLY_OF: dict[Endpoint, str] = {"chat": "messages", "completions": "prompt"}


def _body_of(endpoint: Endpoint) -> Schema:
    made = Body.model_json_schema()["properties"]
    fields = {name: {key: value for key, value in one.items() if key != "title"} for name, one in made.items()}
    own = {name: _nullable(schema) for name, schema in _WRITTEN.items()}
    own[_ONLY_OF[endpoint]] = _WRITTEN[_ONLY_OF[endpoint]]
    neutral = {name: {"enum": [*values, None]} for name, values in NEUTRAL.items()}
    stream = _object((), include_usage=_FLAG, include_obfuscation=_FLAG) | {"required": []}
    properties = {
        **{name: {} for name in sorted(HARMLESS)},
        **neutral,
        "best_of": _nullable(_LENGTH),
        **fields,
        **own,
        "model": _nullable({"type": "string"}),
        "stream": _nullable(_FLAG),
        "stream_options": _nullable(stream),
    }
    for other in _ONLY_OF.values():
        if other != _ONLY_OF[endpoint]:
            properties[other] = {"type": "null"}
    return {
        "type": "object",
        "properties": properties,
        "required": [_ONLY_OF[endpoint]],
        "additionalProperties": False,
    }


_USAGE = _object(prompt_tokens=_INTEGER, completion_tokens=_INTEGER, total_tokens=_INTEGER)
_CHOICE = _object(index=_INTEGER, finish_reason={"enum": ["stop", "length"]})


def _completion(kind: str, **choice: Schema) -> Schema:
    properties = {**_CHOICE["properties"], **choice}
    return _object(
        id={"type": "string"},
        object={"const": kind},
        created=_INTEGER,
        model={"type": "string"},
        choices={"type": "array", "items": _object(**properties)},
        usage=_USAGE,
    )


_ERROR = _object(
    error=_object(
        message={"type": "string"},
        type={"type": "string"},
        param=_nullable({"type": "string"}),
        code=_nullable({"type": "string"}),
    )
)
_FILE = _object(
    id={"type": "string"}, object={"const": "file"}, bytes=_INTEGER, created_at=_INTEGER, filename={"type": "string"},
    purpose={"type": "string"}, status={"type": "string"},
)  # fmt: skip
_BATCH = _object(
    id={"type": "string"},
    object={"const": "batch"},
    endpoint={"type": "string"},
    status={
        "enum": [
            *("validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"),
        ]
    },
    request_counts=_object(total=_INTEGER, completed=_INTEGER, failed=_INTEGER),
    created_at=_INTEGER,
)
_MODEL = _object(
    id={"type": "string"},
    object={"const": "model"},
    created=_INTEGER,
    owned_by={"type": "string"},
    max_model_len=_INTEGER,
)


def _list_of(item: Schema) -> Schema:
    return _object(("object", "data"), object={"const": "list"}, data={"type": "array", "items": item})


def _closed(required: tuple[str, ...], **properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


_JSON = "application/json"
_BODIES: dict[tuple[str, str], tuple[str, Schema]] = {
    ("/v1/chat/completions", "post"): (_JSON, _body_of("chat")),
    ("/v1/completions", "post"): (_JSON, _body_of("completions")),
    ("/tokenize", "post"): (
        _JSON,
        {
            "anyOf": [
                _object(("prompt",), prompt=_WRITTEN["prompt"]),
                _object(("messages",), messages=_WRITTEN["messages"]),
            ]
        },
    ),
    ("/detokenize", "post"): (_JSON, _closed(("tokens",), tokens={**_TOKENS, "minItems": 0}, model={})),
    ("/v1/batches", "post"): (
        _JSON,
        _closed(
            ("endpoint", "input_file_id", "completion_window"),
            endpoint={"enum": ["/v1/chat/completions", "/v1/completions"]},
            input_file_id={"type": "string"},
            completion_window={"type": "string", "pattern": "^[1-9][0-9]{0,4}[mhd]$"},
            metadata=_nullable(
                {
                    "type": "object",
                    "maxProperties": 16,
                    "propertyNames": {"maxLength": 64},
                    "additionalProperties": {"type": "string", "maxLength": 512},
                }
            ),
        ),
    ),
    ("/v1/files", "post"): (
        "multipart/form-data",
        _closed(
            ("file", "purpose"),
            file={"type": "string", "format": "binary"},
            purpose={"enum": ["batch", "user_data"]},
        ),
    ),
}
"""By path and method: the type of a body, and what it holds."""

_STREAM: Schema = {"text/event-stream": {}}
_ANSWERS: dict[tuple[str, str], dict[str, Any]] = {
    ("/v1/chat/completions", "post"): {
        _JSON: {"schema": _completion("chat.completion", message=_object(role={"const": "assistant"}))},
        **_STREAM,
    },
    ("/v1/completions", "post"): {
        _JSON: {"schema": _completion("text_completion", text={"type": "string"})},
        **_STREAM,
    },
    ("/v1/models", "get"): {_JSON: {"schema": _list_of(_MODEL)}},
    ("/v1/models/{name}", "get"): {_JSON: {"schema": _MODEL}},
    ("/v1/files", "get"): {_JSON: {"schema": _list_of(_FILE)}},
    ("/v1/files", "post"): {_JSON: {"schema": _FILE}},
    ("/v1/files/{file_id}", "get"): {_JSON: {"schema": _FILE}},
    ("/v1/files/{file_id}/content", "get"): {"application/octet-stream": {}},
    ("/v1/batches", "get"): {_JSON: {"schema": _list_of(_BATCH)}},
    ("/v1/batches", "post"): {_JSON: {"schema": _BATCH}},
    ("/v1/batches/{batch_id}", "get"): {_JSON: {"schema": _BATCH}},
    ("/v1/batches/{batch_id}/cancel", "post"): {_JSON: {"schema": _BATCH}},
    ("/tokenize", "post"): {_JSON: {"schema": _object(count=_INTEGER, max_model_len=_INTEGER, tokens=_TOKENS)}},
    ("/detokenize", "post"): {_JSON: {"schema": _object(prompt={"type": "string"})}},
    ("/metrics", "get"): {"text/plain": {"schema": {"type": "string"}}},
}


_LINKS: dict[tuple[str, str], tuple[tuple[str, str, str], ...]] = {
    ("/v1/files", "post"): (
        ("/v1/files/{file_id}", "get", "file_id"),
        ("/v1/files/{file_id}/content", "get", "file_id"),
        ("/v1/files/{file_id}", "delete", "file_id"),
    ),
    ("/v1/batches", "post"): (
        ("/v1/batches/{batch_id}", "get", "batch_id"),
        ("/v1/batches/{batch_id}/cancel", "post", "batch_id"),
    ),
}
"""Routes that take the id in an answer as a parameter."""


def describe(app: FastAPI, *, needs_key: bool) -> None:
    """Let `app` describe itself; `needs_key`: all but `/health` takes a bearer token."""

    def openapi() -> Schema:
        if app.openapi_schema is None:
            app.openapi_schema = _described(app, needs_key)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _described(app: FastAPI, needs_key: bool) -> Schema:
    made = get_openapi(title=app.title, version=app.version, routes=app.routes)
    components = made.setdefault("components", {})
    components["schemas"] = {"Error": deepcopy(_ERROR)}
    error = {_JSON: {"schema": {"$ref": "#/components/schemas/Error"}}}
    for path, methods in made["paths"].items():
        for method, operation in methods.items():
            if (path, method) in _BODIES:
                kind, body = _BODIES[path, method]
                operation["requestBody"] = {"required": True, "content": {kind: {"schema": body}}}
            answers = operation["responses"]
            answers.pop("422", None)  # what it stands for is told with 400
            if (path, method) in _ANSWERS:
                answers["200"] = {"description": "Done.", "content": _ANSWERS[path, method]}
            if links := _LINKS.get((path, method)):
                answers["200"]["links"] = {f"{to} {at}": _link(at, to, name) for at, to, name in links}
            refusals = {"4XX": "It is refused, for this reason.", "5XX": "The server cannot do it now."}
            if path == "/health":
                answers["503"] = {"description": "Not ready.", "content": {_JSON: {"schema": _OBJECT}}}
            for status, words in refusals.items():
                answers[status] = {"description": words, "content": error}
    if needs_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        made["security"] = [{"key": []}]
        made["paths"]["/health"]["get"]["security"] = []
    return made


def _link(path: str, method: str, name: str) -> Schema:
    """To the route that takes the answer's id as its parameter `name`."""
    escaped = path.replace("~", "~0").replace("/", "~1")
    return {"operationRef": f"#/paths/{escaped}/{method}", "parameters": {name: "$response.body#/id"}}
