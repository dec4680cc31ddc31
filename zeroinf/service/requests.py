"""Requests, results and refusals: the input and output of a job, without any file format."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from zeroinf.generation.row import FinishReason, Sampling
from zeroinf.sizes import count_text

NOT_NUMBERS = "the model's scores were not numbers"
NOT_NUMBERS_HINT = "float16 overflows in many models, --dtype bfloat16 does not; else the weights may be damaged"


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatOptions:
    """Variables for a chat template besides the messages. Raises ValueError for a variable that every template gets
    anyway.
    """

    variables: tuple[tuple[str, str], ...] = ()
    """Names and values, these as JSON, of variables of the template, such as enable_thinking."""
    add_generation_prompt: bool = True
    """End the prompt where the answer begins."""
    continue_final_message: bool = False
    """End the prompt with the last message, for the model to go on with."""

    def __post_init__(self) -> None:
        if taken := [name for name, _ in self.variables if name in _OF_TEMPLATES]:
            raise ValueError(f"chat_template_kwargs may not set {taken[0]!r}")
        if self.add_generation_prompt and self.continue_final_message:
            raise ValueError("add_generation_prompt and continue_final_message contradict each other")

    def with_variables(self, more: Mapping[str, Any]) -> ChatOptions:
        """These options, and `more` variables, which win."""
        merged = dict(self.variables) | {name: json.dumps(value, sort_keys=True) for name, value in more.items()}
        return replace(self, variables=tuple(sorted(merged.items())))


_OF_TEMPLATES = frozenset(
    {
        *("messages", "conversation", "chat_template", "tools", "documents", "tokenize", "padding", "truncation"),
        *("max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
        *("add_generation_prompt", "continue_final_message"),
    }
)
NO_OPTIONS = ChatOptions()


@dataclass(frozen=True, kw_only=True, slots=True)
class Extra:
    """Fields of a request that only the output needs; the generation loop ignores them."""

    columns: Mapping[str, Any] | None = None
    """What of its entry goes to the output as it is."""
    choice: int | None = None
    """Which of the completions of its entry it is, from 0; None where there is one."""
    echo: bool = False
    """The completion begins with the prompt."""
    endpoint: Literal["chat", "completions"] | None = None
    """What an OpenAI batch line asks for; None for other entries."""
    model: str | None = None
    """The model that a batch line names."""
    first: bool = True
    """It is the first completion of its prompt: the prompt's tokens count once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One request: exactly one of `prompt`, `tokens` and `messages` (role and content, both text) is set."""

    index: int  # position in the input, counted from 0, refused entries included
    line: int | None  # counted from 1; None when the prompt did not come from a file
    id: str
    prompt: str | None
    messages: tuple[dict[str, str], ...] | None
    sampling: Sampling
    file: str | None = None
    """Of several input files, the one that it came from."""
    chat: ChatOptions = NO_OPTIONS
    tokens: tuple[int, ...] | None = None
    """The prompt, where it came as token ids."""
    truncate: int | None = None
    """As many of the last tokens of the prompt as are kept."""
    extra: Extra | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """One tokenized request, ready to become a row."""

    index: int
    line: int | None
    id: str
    text: str | None
    """The prompt as it was written, where results show it."""
    prompt: Sequence[int]
    """Its tokens; 4 bytes each where there may be many."""
    sampling: Sampling
    file: str | None = None
    digest: str | None = None
    """Of the prompt as it was written, where the text is not kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """The result of a request. Token counts exclude padding; `completion` excludes the prompt."""

    index: int
    id: str
    prompt: str | None
    completion: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    logprobs: list[dict[str, Any]] | None = None
    """Of each generated token, as the output tells them, where the request asks for them."""
    extra: Extra | None = None
    """Known where results are written, not on their way there."""
    problem: str | None = None
    """Why it failed, where the model's scores were numbers."""

    @property
    def failed(self) -> bool:
        return self.finish_reason == "error"

    @property
    def reason(self) -> str:
        """Why it failed, if it did."""
        tokens = count_text(self.completion_tokens, "token", "tokens")
        return f"after {tokens} {self.problem or f'{NOT_NUMBERS}; {NOT_NUMBERS_HINT}'}" if self.failed else ""

    @property
    def text(self) -> str:
        """The completion as the output has it: behind its prompt, where that was asked for."""
        return (
            f"{self.prompt or ''}{self.completion}" if self.extra is not None and self.extra.echo else self.completion
        )

    def to_fields(self) -> dict[str, Any]:
        """The fields that the output has for it."""
        told = {} if self.logprobs is None else {"logprobs": self.logprobs}
        own = self.extra or Extra()
        return {
            "id": self.id,
            **({} if own.choice is None else {"choice": own.choice}),
            "completion": self.text,
            "finish_reason": self.finish_reason,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            **told,
            **(own.columns or {}),
        }

    def to_line(self) -> str:
        """One line of JSON, without its line end."""
        return _json_line(self.to_fields())

    def to_record(self) -> dict[str, Any]:
        """All of it but the prompt and what is known of the request anyway, for the journal."""
        left_out = ("prompt", "extra")
        names = (one.name for one in fields(self) if one.name not in left_out)
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Result:
        """A result as `to_record` gave it."""
        return cls(**record, prompt=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """An entry of the input that was not run or failed, with the reason."""

    index: int
    line: int | None
    id: str | None
    reason: str
    file: str | None = None

    @classmethod
    def of(cls, entry: Request | Work, reason: str) -> Refusal:
        return cls(index=entry.index, line=entry.line, id=entry.id, reason=reason, file=entry.file)

    def to_line(self) -> str:
        """One line of JSON, without its line end."""
        where = {} if self.file is None else {"file": self.file}
        return _json_line({**where, "line": self.line, "id": self.id, "error": self.reason})


def _json_line(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, ensure_ascii=False)
