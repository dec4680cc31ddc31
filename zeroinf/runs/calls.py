"""Makes requests of the prompts and keywords that calls of the Python API are given."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from io import BytesIO
from typing import Any

from zeroinf.errors import InputError, UsageError
from zeroinf.generation.row import Sampling
from zeroinf.jobs.readers import read_requests
from zeroinf.service.requests import Extra, Request
from zeroinf.structured.answer_format import AnswerFormat, of_choices, of_regex, of_response_format, of_schema

_ONLY_SAMPLED = ("top_p", "top_k", "min_p", "seed")
_AS_THEY_ARE = (
    *("ignore_eos", "logprobs", "min_tokens"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
)


def sampling_of(keywords: Mapping[str, Any], max_new_tokens: int) -> Sampling:
    """The sampling settings among the `keywords` of a call: greedy unless `do_sample` is set or a temperature above 0
    is given. `max_new_tokens` holds where there is none among them. Raises UsageError that names the keyword."""
    do_sample, temperature = keywords["do_sample"], keywords["temperature"]
    if do_sample is False and temperature:
        raise UsageError("temperature has no effect with do_sample=False", hint="drop one of them")
    if do_sample and temperature is None:
        temperature = 1.0
    sampled = {name: keywords[name] for name in _ONLY_SAMPLED if keywords[name] is not None}
    stop = keywords["stop"]
    try:
        sampling = Sampling(
            max_new_tokens=keywords["max_new_tokens"] or max_new_tokens,
            temperature=temperature or 0.0,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            stop_token_ids=tuple(keywords["stop_token_ids"]),
            logit_bias=tuple(sorted((keywords["logit_bias"] or {}).items())),
            answer_format=_answer_format(keywords),
            **sampled,
            **{name: keywords[name] for name in _AS_THEY_ARE if name in keywords},
        )
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error
    if sampling.is_greedy and sampled:
        raise UsageError(
            f"{', '.join(sampled)} has no effect: the request is greedy", hint="add do_sample=True, or drop it"
        )
    return sampling


def _answer_format(keywords: Mapping[str, Any]) -> AnswerFormat | None:
    """The format that the keywords ask for. Raises ValueError that names the keyword."""
    ways: dict[str, Callable[[Any], AnswerFormat | None]] = {
        "response_format": of_response_format,
        "json_schema": lambda schema: of_schema(_as_schema(schema)),
        "regex": of_regex,
        "choices": of_choices,
    }
    given = [name for name in ways if keywords[name] is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} contradict each other")
    try:
        return ways[given[0]](keywords[given[0]]) if given else None
    except ValueError as error:
        raise ValueError(f"{given[0]}: {error}") from None


def _as_schema(schema: Any) -> Any:
    return schema.model_json_schema() if isinstance(schema, type) and hasattr(schema, "model_json_schema") else schema


def requests_of(prompts: Sequence[Any], sampling: Sampling, *, n: int = 1, echo: bool = False) -> list[Request]:
    """The requests of `prompts`, read as lines of JSONL are, whose own settings win: one request for each completion.

    Raises InputError for one that cannot be run.
    """
    if isinstance(prompts, (str, Mapping)) or is_chat(prompts):
        raise InputError("one prompt where several were expected", hint="give a list of prompts")
    asked = {**({"n": n} if n != 1 else {}), **({"echo": True} if echo else {})}
    lines = [json.dumps({**asked, **_entry(number, prompt)}) for number, prompt in enumerate(prompts)]
    if not lines:
        return []
    source = BytesIO("\n".join(lines).encode())
    requests, refusals = read_requests((), source, sampling, input_format="jsonl", name="prompts")
    if refusals:
        raise InputError(f"prompt {refusals[0].id}: {refusals[0].reason}", hint="correct it, or leave it out")
    return [replace(request, line=None, extra=_shown(request.extra)) for request in requests]


def _shown(extra: Extra | None) -> Extra | None:
    """The part of a result beside its completion: which one of its prompt's it is, and whether the prompt precedes
    it."""
    if extra is None or (extra.choice is None and not extra.echo):
        return None
    return Extra(choice=extra.choice, echo=extra.echo, first=extra.first)


def _entry(number: int, prompt: Any) -> dict[str, Any]:
    if isinstance(prompt, str):
        return {"id": str(number), "prompt": prompt}
    if isinstance(prompt, Mapping):
        return {"id": str(number), **prompt}
    if is_chat(prompt):
        return {"id": str(number), "messages": [dict(message) for message in prompt]}
    raise InputError(f"prompt {number} is {type(prompt).__name__}", hint="give text, a list of messages, or a dict")


def is_chat(value: Any) -> bool:
    """Whether it is a list of messages, and not one of prompts with settings."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        return False
    return all(isinstance(message, Mapping) and "role" in message for message in value)
