"""What an entry of the input asks for: a prompt of text, an object of JSON, an OpenAI batch line or a row of a table.

Each becomes a `Draft`, or a `LineError` that says in one sentence why not. No setting is ignored in silence: what
zeroinf does not do is refused by name, unless the value asks for nothing (`"n": 1`) or the key cannot change the output
(`"user"`).
"""

from __future__ import annotations

import difflib
import json
import reprlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Annotated, Any, Literal, NoReturn

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails

from zeroinf.generation.row import Sampling
from zeroinf.jobs.formats import Record
from zeroinf.jobs.shape import LineError, Shaper, chat_of
from zeroinf.service.requests import NO_OPTIONS, ChatOptions

_LENGTH_NAMES = ("max_new_tokens", "max_tokens", "max_completion_tokens")  # ours, OpenAI's old and new one
_BATCH_KEYS = frozenset({"custom_id", "method", "url", "body"})
_URLS = {"/v1/chat/completions": "messages", "/v1/completions": "prompt"}

# Keys of an OpenAI request body that cannot change the completion.
_HARMLESS = frozenset(
    {"model", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "stream_options"}
)
# Settings of an OpenAI request body (and vLLM's additions to it) that zeroinf does not do, and the values that ask for
# nothing. Null asks for nothing everywhere; a key that stands nowhere is refused as unknown.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "min_p": (0,),
    "n": (1,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "stream": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}


# Validators say what a value must be; `_reason` puts the key before it and the value behind.


def _as_unicode(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("must be valid Unicode, without half surrogate pairs") from None
    return value


def _as_text(value: str) -> str:
    if not value:
        raise ValueError("must not be empty")
    return _as_unicode(value)


def _as_id(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise ValueError("must be a string or an integer")


def _as_stop(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _as_logprobs(value: object) -> object:
    if value is None or isinstance(value, int):
        return value
    raise ValueError("must be true, false or an integer")


def _as_content(value: object) -> object:
    """The text parts of OpenAI's content list become one string, a line break between them, as in vLLM."""
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        match part:
            case {"type": "text", "text": str(text), **rest} if not rest:
                texts.append(text)
            case _:
                raise ValueError("must be a string or a list of text parts")
    return "\n".join(texts)


_Text = Annotated[str, AfterValidator(_as_text)]
_Id = Annotated[_Text, BeforeValidator(_as_id)]


class _Edge(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class _Message(_Edge):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_as_content), AfterValidator(_as_unicode)]

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        """OpenAI's client writes `"tool_calls": null` and the like into the messages that it returns."""
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data


class _Body(_Edge):
    prompt: _Text | None = None
    messages: list[_Message] | None = None
    max_new_tokens: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: Annotated[list[_Text] | None, BeforeValidator(_as_stop)] = None
    ignore_eos: bool | None = None
    logprobs: Annotated[Any, AfterValidator(_as_logprobs)] = None
    top_logprobs: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    enable_thinking: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class _Line(_Body):
    id: _Id | None = None


class _BatchLine(_Edge):
    custom_id: _Id | None = None
    method: Literal["POST"] | None = None
    url: Literal["/v1/chat/completions", "/v1/completions"] | None = None
    body: dict[str, Any]


_KNOWN_KEYS = sorted({*_Line.model_fields, *_BatchLine.model_fields, *_Message.model_fields})
_LIKE_A_SETTING = 0.82
"""How alike the names of a column and of a setting are from which on one is taken for the other, misspelt."""
_EXPECTED = {
    "int_type": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "a string",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """A request that still lacks its index and, where the user gave none, its id."""

    prompt: str | None
    messages: tuple[dict[str, str], ...] | None
    sampling: Sampling
    id: str | None = None
    chat: ChatOptions
    columns: dict[str, Any] | None = None


def draft_of(record: Record, defaults: Sampling, shaper: Shaper | None = None) -> Draft:
    """What `record` asks for; `defaults` holds for every setting that it leaves out.

    Without a `shaper`, an entry is a request as it stands, and a key that requests do not have is an error. Raises
    LineError.
    """
    if record.problem is not None:
        raise LineError(record.problem)
    value = record.value
    if isinstance(value, dict):
        entry = _of_cells(value) if record.kind == "cells" else _without_nulls(value)
        return _parse_entry(entry, defaults, shaper)
    assert value is not None
    text = _decode(value)
    if record.kind == "text":
        return _parse_text(text, defaults, shaper)
    return _parse_entry(_parse_object(text), defaults, shaper)


def _of_cells(row: Mapping[str, str]) -> dict[str, Any]:
    """The values of a row whose cells are text; an empty cell is none. Cells of settings are JSON if they can be."""
    entry: dict[str, Any] = {}
    for name, cell in row.items():
        if not cell:
            continue
        entry[name] = cell
        if name in _Line.model_fields and name not in ("prompt", "id"):
            with suppress(ValueError, RecursionError):
                entry[name] = json.loads(cell)
    return entry


def _without_nulls(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if value is not None}


def _decode(raw: str | bytes) -> str:
    if isinstance(raw, str):
        return raw
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise LineError(f"not UTF-8: byte 0x{raw[error.start]:02x} at position {error.start + 1}") from None


def _parse_text(text: str, defaults: Sampling, shaper: Shaper | None) -> Draft:
    prompt = text if shaper is None else shaper.of_text(text)
    try:
        return _draft(_Body(prompt=prompt), None, defaults, shaper)
    except ValidationError as error:
        raise LineError(f"prompt {error.errors()[0]['ctx']['error']}") from None


def _parse_entry(entry: dict[str, Any], defaults: Sampling, shaper: Shaper | None) -> Draft:
    try:
        if not _BATCH_KEYS.isdisjoint(entry):
            return _parse_batch_line(entry, defaults, shaper)
        if shaper is None:
            line = _Line.model_validate(entry)
            return _draft(line, line.id, defaults, None)
        shaped = shaper.of_columns(entry)
        line = _Line.model_validate(_settings_of(shaped, shaper))
        return replace(_draft(line, line.id, defaults, shaper), columns=shaper.kept(entry))
    except (ValidationError, LineError) as error:
        reason = _reason(error) if isinstance(error, ValidationError) else str(error)
        raise LineError(reason, id=_readable_id(entry)) from None


@lru_cache
def _misspelt(name: str) -> str | None:
    """The setting that a column is taken for."""
    near = difflib.get_close_matches(name, _Line.model_fields, n=1, cutoff=_LIKE_A_SETTING)
    return near[0] if near else None


def _settings_of(entry: Mapping[str, Any], shaper: Shaper) -> dict[str, Any]:
    """What of `entry` makes a request; other columns are left, unless one is taken for a misspelt setting."""
    settings = {name: value for name, value in entry.items() if name in _Line.model_fields}
    for name in entry.keys() - settings.keys():
        if shaper.uses(name):
            continue
        if near := _misspelt(name):
            raise LineError(f"unknown key {name!r}; did you mean {near!r}? (--keep-columns {name} keeps a column)")
    shaper.unused.update(dict.fromkeys(n for n in entry if n not in settings and not shaper.uses(n)))
    if "prompt" not in settings and "messages" not in settings and entry:
        names = ", ".join(list(entry)[:8])
        raise LineError(f"neither prompt nor messages is given, but {names}: --prompt-column or --template says which")
    return settings


def _parse_object(text: str) -> dict[str, Any]:
    try:
        entry = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise LineError(f"not JSON: {error.msg} at column {error.colno}") from None
    except ValueError as error:  # an integer of thousands of digits
        raise LineError(f"not JSON: {error}") from None
    except RecursionError:
        raise LineError("not JSON: nested too deeply") from None
    if not isinstance(entry, dict):
        raise LineError(f"must be a JSON object, not {reprlib.repr(entry)}")
    return entry


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        keys = [key for key, _ in pairs]
        raise LineError(f"key {next(key for key in keys if keys.count(key) > 1)!r} stands twice in one object")
    return unique


def _refuse_constant(constant: str) -> NoReturn:
    raise LineError(f"not JSON: {constant}")


def _parse_batch_line(entry: dict[str, Any], defaults: Sampling, shaper: Shaper | None) -> Draft:
    batch = _BatchLine.model_validate(entry)
    settings = {key: value for key, value in batch.body.items() if not _asks_for_nothing(key, value)}
    prompt = settings.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        settings["prompt"] = prompt[0]
    body = _Body.model_validate(settings)
    if batch.url is not None and getattr(body, _URLS[batch.url]) is None:
        raise LineError(f"{batch.url} takes {_URLS[batch.url]}, which is missing")
    return _draft(body, batch.custom_id, defaults, shaper)


def _asks_for_nothing(key: str, value: object) -> bool:
    """Whether a key of an OpenAI body can be left out; raises LineError for a setting that zeroinf does not do."""
    if key in _HARMLESS or value is None:
        return True
    if key not in _NEUTRAL:
        return False
    # To Python False equals 0 and True equals 1; to the API they are of different types.
    if any(value == nothing and isinstance(value, bool) == isinstance(nothing, bool) for nothing in _NEUTRAL[key]):
        return True
    raise LineError(f"{key}={reprlib.repr(value)} is not supported")


def _draft(body: _Body, request_id: str | None, defaults: Sampling, shaper: Shaper | None) -> Draft:
    if body.prompt is not None and body.messages is not None:
        raise LineError("prompt and messages are both given")
    if body.prompt is None and not body.messages:
        raise LineError("neither prompt nor messages is given" if body.messages is None else "messages is empty")
    messages = tuple({"role": message.role, "content": message.content} for message in body.messages or ())
    prompt: str | None = body.prompt
    if shaper is not None:
        if prompt is not None and shaper.shape.chat:
            messages = chat_of(prompt, shaper.system)
            prompt = None
        elif messages and shaper.system is not None and messages[0]["role"] not in ("system", "developer"):
            messages = ({"role": "system", "content": shaper.system}, *messages)
        elif prompt is not None and shaper.system is not None:
            raise LineError("--system is for chats, and this is a plain prompt: add --chat")
    return Draft(
        id=request_id,
        prompt=prompt,
        messages=messages or None,
        sampling=_sampling(body, defaults),
        chat=_chat_options(body, NO_OPTIONS if shaper is None else shaper.shape.chat_options, is_chat=bool(messages)),
    )


def _given(body: _Body, *names: str) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(body, name)) is not None}


def _chat_options(body: _Body, defaults: ChatOptions, *, is_chat: bool) -> ChatOptions:
    named = _given(body, "reasoning_effort", "enable_thinking")
    variables = {**(body.chat_template_kwargs or {}), **named}
    ends = _given(body, "add_generation_prompt", "continue_final_message")
    if ends.get("continue_final_message"):
        ends.setdefault("add_generation_prompt", False)
    if not (variables or ends):
        return defaults
    if not is_chat:
        name = next(iter({**named, **ends}), "chat_template_kwargs")
        raise LineError(f"{name} is for messages, and this is a plain prompt")
    try:
        return replace(defaults, **ends).with_variables(variables)
    except ValueError as error:
        raise LineError(str(error)) from None


def _sampling(body: _Body, defaults: Sampling) -> Sampling:
    lengths = {name: value for name in _LENGTH_NAMES if (value := getattr(body, name)) is not None}
    if len(set(lengths.values())) > 1:
        raise LineError(" and ".join(f"{name}={value}" for name, value in lengths.items()) + " contradict each other")
    given = {
        "max_new_tokens": next(iter(lengths.values()), None),
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "seed": body.seed,
        "stop": None if body.stop is None else tuple(body.stop),
        "ignore_eos": body.ignore_eos,
    }
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if (logprobs := _logprobs(body, defaults.logprobs)) != defaults.logprobs:
        changes["logprobs"] = logprobs
    try:
        return replace(defaults, **changes) if changes else defaults
    except ValueError as error:
        raise LineError(str(error)) from None


def _logprobs(body: _Body, default: int | None) -> int | None:
    """Completions ask with a number (`logprobs: 5`), chats with two keys (`logprobs: true, top_logprobs: 5`)."""
    if body.top_logprobs and body.logprobs is not True:
        raise LineError(f"top_logprobs={body.top_logprobs} needs logprobs=true")
    if body.logprobs is None:
        return default
    if isinstance(body.logprobs, bool):
        return (body.top_logprobs or 0) if body.logprobs else None
    return int(body.logprobs)


def _readable_id(entry: dict[str, Any]) -> str | None:
    """The id of a line that is refused for another reason."""
    try:
        return _as_text(_as_id(entry.get("custom_id", entry.get("id"))))
    except ValueError:
        return None


def _reason(error: ValidationError) -> str:
    """Pydantic's first complaint in our words, and how many more there are."""
    first, *others = error.errors(include_url=False)
    return _complaint(first) + (f" (and {len(others)} more)" if others else "")


def _complaint(error: ErrorDetails) -> str:
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"]).removeprefix(".")
    kind = error["type"]
    if kind == "missing":
        return f"{where} is missing"
    if kind == "extra_forbidden":
        similar = difflib.get_close_matches(str(error["loc"][-1]), _KNOWN_KEYS, n=1)
        return f"unknown key {where!r}" + (f"; did you mean {similar[0]!r}?" if similar else "")
    if kind == "value_error":
        must = str(error["ctx"]["error"])
    elif kind == "literal_error":
        must = f"must be {error['ctx']['expected']}"
    else:
        must = f"must be {_EXPECTED[kind]}" if kind in _EXPECTED else error["msg"]
    return f"{where} {must}, not {reprlib.repr(error['input'])}"
