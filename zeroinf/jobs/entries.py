"""Parses entries of the input: a prompt of text, a JSON object, an OpenAI batch line or a row of a table.

Output: a `Draft` for each, or a `LineError` with one sentence that says why not. No setting is ignored silently:
settings that zeroinf does not support are refused by name, unless the value has no effect (`"tools": []`) or the key
cannot change the output (`"user"`).
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NoReturn

from pydantic import ValidationError

from zeroinf.generation.row import Sampling
from zeroinf.jobs.fields import BatchLine, Body, Line, as_id, as_text, reason_of
from zeroinf.jobs.foreign import Endpoint, asks_for_nothing, is_foreign, meant_by
from zeroinf.jobs.formats import InputRecord
from zeroinf.jobs.shape import LineError, Shaper, chat_of
from zeroinf.service.requests import NO_OPTIONS, ChatOptions
from zeroinf.structured.answer_format import AnswerFormat, of_response_format

_LENGTH_NAMES = ("max_new_tokens", "max_tokens", "max_completion_tokens")  # ours, OpenAI's old and new one
_LEAST_NAMES = ("min_tokens", "min_new_tokens")
_BATCH_KEYS = frozenset({"custom_id", "method", "url", "body"})
_MOST_CHOICES = 128
"""As many completions of one prompt as OpenAI's API gives."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """A request that still lacks its index and, where the user gave none, its id."""

    prompts: tuple[str | tuple[int, ...], ...] = ()
    """Texts or token ids; empty where there are messages."""
    messages: tuple[dict[str, str], ...] | None = None
    count: int = 1
    """Completions of each prompt."""
    sampling: Sampling
    id: str | None = None
    chat: ChatOptions = NO_OPTIONS
    columns: dict[str, Any] | None = None
    echo: bool = False
    """The completion begins with the prompt."""
    truncate: int | None = None
    """As many of the last tokens of a prompt as are kept."""
    endpoint: Endpoint | None = None
    """What an OpenAI batch line asks for, None for other entries."""
    model: str | None = None
    """The model that a batch line names."""

    @property
    def choices(self) -> int:
        """Completions of all prompts."""
        return self.count * max(1, len(self.prompts))


def draft_of(record: InputRecord, defaults: Sampling, shaper: Shaper | None = None) -> Draft:
    """Read the request in `record`; `defaults` holds for every setting that it leaves out.

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
    return _parse_entry(parse_object(text), defaults, shaper)


def _of_cells(row: Mapping[str, str]) -> dict[str, Any]:
    """The values of a row whose cells are text; an empty cell is none. Cells of settings are JSON if they can be."""
    entry: dict[str, Any] = {}
    for name, cell in row.items():
        if not cell:
            continue
        entry[name] = cell
        if name in Line.model_fields and name not in ("prompt", "id"):
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
        return _draft(Body(prompt=prompt), None, defaults, shaper)
    except ValidationError as error:
        raise LineError(f"prompt {error.errors()[0]['ctx']['error']}") from None


def _parse_entry(entry: dict[str, Any], defaults: Sampling, shaper: Shaper | None) -> Draft:
    try:
        if not _BATCH_KEYS.isdisjoint(entry):
            return _parse_batch_line(entry, defaults, shaper)
        if shaper is None:
            line = Line.model_validate(_own(entry))
            return _draft(line, line.id, defaults, None)
        line = Line.model_validate(_own(_settings_of(shaper.of_columns(entry), shaper)))
        return replace(_draft(line, line.id, defaults, shaper), columns=shaper.kept(entry))
    except (ValidationError, LineError) as error:
        reason = reason_of(error) if isinstance(error, ValidationError) else str(error)
        raise LineError(reason, id=_readable_id(entry)) from None


def _own(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` without those that ask for nothing. Raises LineError for one that zeroinf does not do."""
    if settings.get("best_of") not in (None, 1, settings.get("n")):
        raise LineError(f"best_of={reprlib.repr(settings['best_of'])} is not supported")
    return {key: value for key, value in settings.items() if key != "best_of" and not asks_for_nothing(key, value)}


@lru_cache
def _misspelt(name: str) -> str | None:
    """The setting that a column is taken for."""
    return meant_by(name, Line.model_fields) if name not in ("text", "input", "inputs", "system") else None


def _settings_of(entry: Mapping[str, Any], shaper: Shaper) -> dict[str, Any]:
    """The settings in `entry` that make a request; other columns are left, unless one is taken for a misspelt
    setting."""
    fixed = ("prompt", "messages", "id")
    settings = {
        name: value
        for name, value in entry.items()
        if name in fixed or ((name in Line.model_fields or is_foreign(name)) and name not in shaper.read)
    }
    columns = [name for name in entry if name not in settings and not shaper.uses(name)]
    for name in columns:
        if near := _misspelt(name):
            raise LineError(f"unknown key {name!r}; did you mean {near!r}? (--keep-columns {name} keeps a column)")
    shaper.unused.update(dict.fromkeys(columns))
    if "prompt" not in settings and "messages" not in settings and entry:
        names = ", ".join(list(entry)[:8])
        raise LineError(f"neither prompt nor messages is given, but {names}: --prompt-column or --template says which")
    return settings


def parse_object(text: str) -> dict[str, Any]:
    """The JSON object that `text` is. Raises LineError for another value, for NaN, and for a key that stands twice."""
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
    batch = BatchLine.model_validate(entry)
    body = Body.model_validate(_own(batch.body))
    endpoint: Endpoint = batch.url or ("chat" if body.messages is not None else "completions")
    taken = "messages" if endpoint == "chat" else "prompt"
    if getattr(body, taken) is None and (batch.url is not None or body.messages is not None):
        raise LineError(f"{entry['url']} takes {taken}, which is missing")
    model = batch.body.get("model")
    draft = _draft(body, batch.custom_id, defaults, shaper)
    return replace(draft, endpoint=endpoint, model=model if isinstance(model, str) else None)


def _draft(body: Body, request_id: str | None, defaults: Sampling, shaper: Shaper | None) -> Draft:
    if body.prompt is not None and body.messages is not None:
        raise LineError("prompt and messages are both given")
    if body.prompt is None and not body.messages:
        raise LineError("neither prompt nor messages is given" if body.messages is None else "messages is empty")
    messages = tuple(_message(one.role, one.content, one.name) for one in body.messages or ())
    prompts = tuple(one if isinstance(one, str) else tuple(one) for one in body.prompt or ())
    if shaper is not None:
        prompts, messages = _as_chat(prompts, messages, shaper)
    sampling = _sampling(body, defaults)
    if body.truncate_prompt_tokens is not None and body.truncate_prompt_tokens < 1:
        raise LineError(f"truncate_prompt_tokens must be at least 1, not {body.truncate_prompt_tokens}")
    if body.echo and messages:
        raise LineError("echo=True is for prompts, and these are messages")
    if body.echo and sampling.logprobs is not None:
        raise LineError("echo=True with logprobs, those of the prompt, is not supported")
    return Draft(
        id=request_id,
        prompts=prompts,
        messages=messages or None,
        count=_count(body.n, sampling, shaper),
        sampling=sampling,
        chat=_chat_options(body, NO_OPTIONS if shaper is None else shaper.shape.chat_options, is_chat=bool(messages)),
        echo=bool(body.echo),
        truncate=body.truncate_prompt_tokens,
    )


def _message(role: str, content: str, name: str | None) -> dict[str, str]:
    return {"role": role, "content": content, **({} if name is None else {"name": name})}


def _as_chat(
    prompts: tuple[str | tuple[int, ...], ...], messages: tuple[dict[str, str], ...], shaper: Shaper
) -> tuple[tuple[str | tuple[int, ...], ...], tuple[dict[str, str], ...]]:
    """Prompts and messages, of which one is empty, as `--chat` and `--system` want them."""
    if prompts and shaper.shape.chat:
        if len(prompts) > 1 or not isinstance(prompts[0], str):
            raise LineError("--chat makes a user message of one text, not of token ids or several prompts")
        return (), chat_of(prompts[0], shaper.system)
    if shaper.system is None:
        return prompts, messages
    if prompts:
        raise LineError("--system is for chats, and this is a plain prompt: add --chat")
    if messages[0]["role"] in ("system", "developer"):
        return prompts, messages
    return prompts, ({"role": "system", "content": shaper.system}, *messages)


def _count(asked: int | None, sampling: Sampling, shaper: Shaper | None) -> int:
    count = asked if asked is not None else 1 if shaper is None else shaper.shape.samples
    if not 1 <= count <= _MOST_CHOICES:
        raise LineError(f"n must lie between 1 and {_MOST_CHOICES}, not {count}")
    if count > 1 and sampling.is_greedy:
        raise LineError(f"n={count} completions of a greedy request would be equal: set a temperature, or drop n")
    return count


def _given(body: Body, *names: str) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(body, name)) is not None}


def _chat_options(body: Body, defaults: ChatOptions, *, is_chat: bool) -> ChatOptions:
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


def _sampling(body: Body, defaults: Sampling) -> Sampling:
    changes: dict[str, Any] = {
        **_given(body, "temperature", "top_p", "top_k", "seed", "ignore_eos", "min_p", "skip_special_tokens"),
        **_given(body, "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias"),
        **{name: tuple(value) for name, value in _given(body, "stop", "stop_token_ids").items()},
    }
    if (most := _agreed(body, _LENGTH_NAMES)) is not None:
        changes["max_new_tokens"] = most
    if (least := _agreed(body, _LEAST_NAMES)) is not None:
        changes["min_tokens"] = least
    if body.include_stop_str_in_output is not None:
        changes["include_stop"] = body.include_stop_str_in_output
    if body.response_format is not None:
        changes["answer_format"] = _answer_format(body.response_format)
    if changes.get("top_k") == -1:  # vLLM's way to say that nothing is filtered
        changes["top_k"] = 0
    if changes.get("top_p") == 0:  # of the likeliest tokens no more than the first
        changes |= {"top_p": 1.0, "temperature": 0.0}
    if (logprobs := _logprobs(body, defaults.logprobs)) != defaults.logprobs:
        changes["logprobs"] = logprobs
    changes = {name: value for name, value in changes.items() if value != getattr(defaults, name)}
    try:
        return replace(defaults, **changes) if changes else defaults
    except ValueError as error:
        raise LineError(_as_named(str(error), body)) from None


def _as_named(reason: str, body: Body) -> str:
    """`reason`, which begins with a setting, by the name that the request has for it."""
    for names in (_LENGTH_NAMES, _LEAST_NAMES):
        ours, given = names[0], next(iter(_given(body, *names)), names[0])
        if reason.startswith(ours):
            return given + reason.removeprefix(ours)
    return reason


def _answer_format(value: Mapping[str, Any]) -> AnswerFormat | None:
    try:
        return of_response_format(value)
    except ValueError as error:
        raise LineError(f"response_format: {error}") from None


def _agreed(body: Body, names: tuple[str, ...]) -> int | None:
    """The value of the one setting that has several names."""
    values = _given(body, *names)
    if len(set(values.values())) > 1:
        raise LineError(" and ".join(f"{name}={value}" for name, value in values.items()) + " contradict each other")
    return next(iter(values.values()), None)


def _logprobs(body: Body, default: int | None) -> int | None:
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
        return as_text(as_id(entry.get("custom_id", entry.get("id"))))
    except ValueError:
        return None
