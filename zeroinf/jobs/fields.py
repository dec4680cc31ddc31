"""Defines the keys of a request and validates their values."""

from __future__ import annotations

import reprlib
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails

from zeroinf.jobs.foreign import Endpoint, endpoint_of, meant_by

# Validators say what a value must be; `reason_of` puts the key before it and the value behind.


def _as_unicode(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("must be valid Unicode, without half surrogate pairs") from None
    return value


def as_text(value: str) -> str:
    if not value:
        raise ValueError("must not be empty")
    return _as_unicode(value)


def as_id(value: object) -> str:
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


def _as_prompts(value: object) -> object:
    """Prompts of a request: texts, or lists of token ids. One alone needs no list around it."""
    if isinstance(value, str):
        return [as_text(value)]
    if not isinstance(value, list) or not value:
        raise ValueError("must be a string, or a list of strings or of token ids")
    if all(map(_is_token, value)):
        return [value]
    for one in value:
        if isinstance(one, str):
            as_text(one)
        elif not (isinstance(one, list) and one and all(map(_is_token, one))):
            raise ValueError("must be a string, or a list of strings or of token ids")
    return value


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _as_biases(value: object) -> object:
    """Token ids, which JSON has as text, and what is added to their scores."""
    if not isinstance(value, dict):
        raise ValueError("must be an object")
    biases = []
    for token, bias in value.items():
        if not token.isdecimal() or isinstance(bias, bool) or not isinstance(bias, int | float):
            raise ValueError("must have token ids as keys and numbers as values")
        biases.append((int(token), float(bias)))
    return tuple(sorted(biases))


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


_Text = Annotated[str, AfterValidator(as_text)]
_Id = Annotated[_Text, BeforeValidator(as_id)]


class _Edge(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class _Message(_Edge):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_as_content), AfterValidator(_as_unicode)]
    name: _Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _nothing_is_absent(cls, data: Any) -> Any:
        """OpenAI's client writes `"tool_calls": null`, `"annotations": []` and the like into messages."""
        if not isinstance(data, dict):
            return data
        return {
            key: value for key, value in data.items() if value is not None and not (key != "content" and value == [])
        }


class Body(_Edge):
    prompt: Annotated[Any, BeforeValidator(_as_prompts)] = None
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
    n: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    min_p: float | None = None
    min_tokens: int | None = None
    min_new_tokens: int | None = None
    logit_bias: Annotated[Any, BeforeValidator(_as_biases)] = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    echo: bool | None = None
    response_format: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    enable_thinking: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class Line(Body):
    id: _Id | None = None


def _as_post(value: object) -> object:
    if not isinstance(value, str) or value.upper() != "POST":
        raise ValueError("must be 'POST'")
    return "POST"


def _as_endpoint(value: object) -> Endpoint:
    if isinstance(value, str) and (endpoint := endpoint_of(value)) is not None:
        return endpoint
    raise ValueError("must be '/v1/chat/completions' or '/v1/completions'")


class BatchLine(_Edge):
    custom_id: _Id | None = None
    method: Annotated[str | None, BeforeValidator(_as_post)] = None
    url: Annotated[Any, BeforeValidator(_as_endpoint)] = None
    body: dict[str, Any]


KNOWN_KEYS = sorted({*Line.model_fields, *BatchLine.model_fields, *_Message.model_fields})
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


def reason_of(error: ValidationError) -> str:
    """Pydantic's first complaint in our words, and how many more there are."""
    first, *others = error.errors(include_url=False)
    return _complaint(first) + (f" (and {len(others)} more)" if others else "")


def _complaint(error: ErrorDetails) -> str:
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"]).removeprefix(".")
    kind = error["type"]
    if kind == "missing":
        return f"{where} is missing"
    if kind == "extra_forbidden":
        similar = meant_by(str(error["loc"][-1]), KNOWN_KEYS)
        return f"unknown key {where!r}" + (f"; did you mean {similar!r}?" if similar else "")
    if kind == "value_error":
        must = str(error["ctx"]["error"])
    elif kind == "literal_error":
        must = f"must be {error['ctx']['expected']}"
    else:
        must = f"must be {_EXPECTED[kind]}" if kind in _EXPECTED else error["msg"]
    return f"{where} {must}, not {reprlib.repr(error['input'])}"
