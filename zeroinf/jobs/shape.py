"""Turns entries of the input into prompts: columns, templates, system messages, and columns to keep.

A template is Jinja2 and runs in its sandbox. A name in it that an entry does not have is an error, never an empty text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from zeroinf.errors import InputError, UsageError
from zeroinf.service.requests import NO_OPTIONS, ChatOptions

ALL = "all"
OUTPUT_NAMES = ("id", "choice", "completion", "finish_reason", "prompt_tokens", "completion_tokens", "logprobs")


class LineError(Exception):
    """Why an entry is refused, and its id where that is known."""

    def __init__(self, reason: str, *, id: str | None = None) -> None:  # noqa: A002 - the field's own name
        super().__init__(reason)
        self.id = id


@dataclass(frozen=True, kw_only=True, slots=True)
class EntryShape:
    """Options that say how entries become prompts; nothing is read or compiled yet."""

    prompt_column: str | None = None
    messages_column: str | None = None
    id_column: str | None = None
    system: str | None = None
    """A system message for chats that begin with none."""
    template: str | None = None
    """Jinja2, or `@` and the file that holds it: makes the prompt from an entry's columns."""
    keep: tuple[str, ...] = ()
    """Columns that go to the output; ("all",) is all but the id."""
    limit: int | None = None
    """As many entries as are read."""
    chat: bool = False
    """Prompts become user messages."""
    chat_options: ChatOptions = NO_OPTIONS
    samples: int = 1
    """Completions of each prompt, where its entry does not say."""

    def check(self) -> None:
        """Raises UsageError for what contradicts itself."""
        sources = {
            "--template": self.template,
            "--prompt-column": self.prompt_column,
            "--messages-column": self.messages_column,
        }
        if len(named := [flag for flag, value in sources.items() if value is not None]) > 1:
            raise UsageError(f"{' and '.join(named)} contradict each other", hint="name one source of the prompt")
        if clash := [name for name in self.keep if name in OUTPUT_NAMES and name != ALL]:
            raise UsageError(
                f"--keep-columns {clash[0]}: the output has a key of that name", hint="rename the column in the input"
            )
        if ALL in self.keep and len(self.keep) > 1:
            raise UsageError("--keep-columns all names all of them", hint="drop the others")


class Shaper:
    """Carries out a Shape. Raises InputError or UsageError for a template that cannot be read or compiled."""

    def __init__(self, shape: EntryShape) -> None:
        shape.check()
        self.shape = shape
        self.unused: dict[str, None] = {}
        """Columns that nothing has used, in the order in which they came."""
        self.system = None if shape.system is None else _text_of(shape.system, "--system")
        source = None if shape.template is None else _text_of(shape.template, "--template")
        self._template = None if source is None else _compiled(source)
        self.read = frozenset[str]() if self._template is None else _names_in(self._template, source)
        """Columns that the template reads: they are no settings, whatever their names."""

    @cached_property
    def named(self) -> frozenset[str]:
        """Columns that the user names."""
        shape = self.shape
        own = (shape.prompt_column, shape.messages_column, shape.id_column)
        return frozenset(name for name in (*own, *shape.keep) if name is not None)

    def of_text(self, prompt: str) -> str:
        """The prompt of an entry that has no columns."""
        named = {"--prompt-column": self.shape.prompt_column, "--messages-column": self.shape.messages_column}
        if flag := next((flag for flag, name in named.items() if name is not None), None):
            raise LineError(f"a line of text has no columns, which {flag} asks for")
        return prompt if self._template is None else self._rendered({"prompt": prompt})

    def of_columns(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        """`entry` with `prompt`, `messages` and `id` where a request has them. Raises LineError."""
        shape, shaped = self.shape, dict(entry)
        if self._template is not None:
            shaped.pop("messages", None)
            shaped["prompt"] = self._rendered(entry)
        elif shape.prompt_column is not None:
            shaped.pop("messages", None)
            shaped["prompt"] = _column(entry, shape.prompt_column)
        elif shape.messages_column is not None:
            shaped.pop("prompt", None)
            shaped["messages"] = _messages(_column(entry, shape.messages_column))
        if shape.id_column is not None:
            shaped["id"] = _column(entry, shape.id_column)
        return shaped

    def kept(self, entry: Mapping[str, Any]) -> dict[str, Any] | None:
        """The columns that go to the output, as JSON has them."""
        keep = self.shape.keep
        if not keep:
            return None
        names = [name for name in entry if name != (self.shape.id_column or "id")] if keep == (ALL,) else keep
        if clash := [name for name in names if name in OUTPUT_NAMES]:
            raise LineError(f"column {clash[0]!r} cannot be kept: the output has a key of that name")
        return {name: _as_json(entry[name], name) for name in names if name in entry}

    def uses(self, name: str) -> bool:
        """Whether the user asks for a column by its name, or for all of them."""
        return name in self.named or name in self.read or self.shape.keep == (ALL,)

    def _rendered(self, entry: Mapping[str, Any]) -> str:
        from jinja2 import UndefinedError

        assert self._template is not None
        try:
            return str(self._template.render(entry))
        except UndefinedError as error:
            raise LineError(f"the template cannot be filled: {error.message}") from None
        except Exception as error:  # templates are programs, and raise what they like
            raise LineError(f"the template cannot be filled: {error}") from None


def chat_of(prompt: str, system: str | None) -> tuple[dict[str, str], ...]:
    """A conversation that begins with `prompt`."""
    user = {"role": "user", "content": prompt}
    return (user,) if system is None else ({"role": "system", "content": system}, user)


def _text_of(given: str, flag: str) -> str:
    if not given.startswith("@"):
        return given
    try:
        return Path(given[1:]).read_text(encoding="utf-8-sig").rstrip("\n")
    except (OSError, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InputError(f"{flag} {given}: {why}", hint="@ and the name of a file, or the text itself") from error


def _compiled(source: str) -> Any:
    from jinja2 import StrictUndefined, TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined)
    environment.filters["tojson"] = lambda value, **how: json.dumps(value, ensure_ascii=False, default=str, **how)
    try:
        return environment.from_string(source)
    except TemplateError as error:
        raise UsageError(f"--template is no Jinja2: {error}", hint="columns are written as {{ name }}") from error


def _names_in(template: Any, source: str | None) -> frozenset[str]:
    from jinja2 import meta

    return frozenset(meta.find_undeclared_variables(template.environment.parse(source or "")))


def _column(entry: Mapping[str, Any], name: str) -> Any:
    if name not in entry:
        known = ", ".join(list(entry)[:8]) or "none"
        raise LineError(f"column {name!r} is missing; there are: {known}")
    return entry[name]


def _messages(value: Any) -> Any:
    """Messages as a list; in cells of text they are JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _as_json(value: Any, column: str) -> Any:
    """`value` with nothing in it that JSON does not have: dates and decimals as text, NaN as null."""
    if isinstance(value, Mapping):
        return {str(key): _as_json(one, column) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(one, column) for one in value]
    if isinstance(value, bytes):
        raise LineError(f"column {column!r} cannot be kept: it holds bytes")
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float) else str(value)


def flags_of(names: Sequence[str]) -> str:
    """Column names as a note tells them."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
