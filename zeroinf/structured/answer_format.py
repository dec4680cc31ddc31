"""Defines the format of an answer, as requests ask for it, and checks it before a model is loaded.

Input: `response_format` of OpenAI's API, a JSON schema, a regular expression, a list of choices or a grammar. Output:
an `AnswerFormat`, small and immutable, which travels with a request's sampling settings. What cannot be carried out
raises ValueError with a reason that names it; EnvironmentProblem where llguidance is not installed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

from zeroinf.errors import EnvironmentProblem
from zeroinf.structured.schema import misspelt_keyword

Kind = Literal["json_schema", "regex", "choices", "grammar"]

_TYPES = ("text", "json_object", "json_schema", "regex", "choices", "grammar")
_WHITESPACE = r"[ \t]{1,32}|\r?\n[ \t]{0,32}"
"""Between the tokens of JSON: enough for any indentation, and not so much that an answer is nothing else."""


_OWN = "x-guidance"
"""Where llguidance's own settings stand in a schema."""
_EVERY_TOKEN = '%llguidance {"no_forcing": true}'
"""Where only one text can follow, the model still chooses among the tokens that it may begin with."""


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """The format that an answer must have. Made by the functions of this module, which check it."""

    kind: Kind
    text: str
    """A JSON schema as JSON, a regular expression, choices as a JSON list, or a grammar."""

    def grammar(self) -> str:
        """The grammar of such answers, as llguidance has it."""
        if self.kind == "grammar":
            return f"{_EVERY_TOKEN}\n{self.text}"
        if self.kind == "regex":
            start = f"/{_library().regex_to_lark(self.text, 'dw')}/"
        elif self.kind == "choices":
            start = " | ".join(map(_quoted, json.loads(self.text)))
        else:
            own = {"whitespace_pattern": _WHITESPACE, "lenient": False, "coerce_one_of": False}
            start = f"%json {json.dumps({**json.loads(self.text), _OWN: own}, ensure_ascii=False)}"
        return f"{_EVERY_TOKEN}\nstart: {start}"


def _quoted(text: str) -> str:
    """`text` as grammars write it: like JSON, and control characters beyond JSON's as numbers, too."""
    return re.sub(r"[\x7f-\x9f]", lambda found: f"\\u{ord(found[0]):04x}", json.dumps(text, ensure_ascii=False))


def of_schema(schema: object) -> AnswerFormat:
    """Answers that are JSON and valid against `schema`. Properties come in its order."""
    if not isinstance(schema, Mapping):
        raise ValueError(f"a JSON schema must be an object, not {_shown(schema)}")
    if _OWN in schema:
        raise ValueError(f"the JSON schema has {_OWN!r}, which is set here")
    if found := misspelt_keyword(schema):
        raise ValueError("the JSON schema has the keyword {!r}; did you mean {!r}?".format(*found))
    return _checked(AnswerFormat("json_schema", json.dumps(schema, ensure_ascii=False)))


def of_regex(pattern: object) -> AnswerFormat:
    """Answers that match `pattern` as a whole; the syntax is that of Rust's regex crate, without lookaround."""
    if not isinstance(pattern, str) or not pattern:
        raise ValueError(f"a regex must be a text that is not empty, not {_shown(pattern)}")
    return _checked(AnswerFormat("regex", pattern))


def of_choices(choices: object) -> AnswerFormat:
    """Answers that are one of `choices`."""
    if isinstance(choices, str) or not isinstance(choices, Sequence) or not choices:
        raise ValueError(f"choices must be a list of texts, not {_shown(choices)}")
    if wrong := [choice for choice in choices if not isinstance(choice, str) or not choice]:
        raise ValueError(f"choices must be texts that are not empty, not {_shown(wrong[0])}")
    return _checked(AnswerFormat("choices", json.dumps(list(dict.fromkeys(choices)), ensure_ascii=False)))


def of_grammar(text: object) -> AnswerFormat:
    """Answers that the rule `start` of a grammar makes; the syntax is Lark's, as llguidance has it."""
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"a grammar must be a text that is not empty, not {_shown(text)}")
    if "%llguidance" in text:
        raise ValueError("the grammar has '%llguidance', which is set here")
    return _checked(AnswerFormat("grammar", text))


def of_response_format(value: object) -> AnswerFormat | None:
    """The format that `response_format` asks for, as OpenAI has it, and `{"type": "regex", "regex": ...}`, `{"type":
    "choices", "choices": [...]}` and `{"type": "grammar", "grammar": ...}` beside it; None where that is plain text."""
    if not isinstance(value, Mapping):
        raise ValueError(f"must be an object, not {_shown(value)}")
    kind = value.get("type")
    if kind not in _TYPES:
        raise ValueError(f"must have a type, one of {', '.join(_TYPES)}, not {_shown(kind)}")
    own = kind if kind in get_args(Kind) else None
    if unknown := [key for key in value if key not in ("type", own)]:
        raise ValueError(f"type {kind} has no key {unknown[0]!r}")
    if own is not None and own not in value:
        raise ValueError(f"type {kind} must have the key {own!r}")
    if kind == "text":
        return None
    if kind == "json_object":
        return of_schema({"type": "object"})
    if kind == "regex":
        return of_regex(value["regex"])
    if kind == "choices":
        return of_choices(value["choices"])
    if kind == "grammar":
        return of_grammar(value["grammar"])
    return of_schema(_schema_of(value["json_schema"]))


def of_file(text: str) -> AnswerFormat:
    """The format that a file of `--json-schema` asks for: a schema, or an object as `response_format` has it."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    if isinstance(value, Mapping) and value.get("type") == "json_schema":
        found = of_response_format(value)
        assert found is not None
        return found
    return of_schema(value)


def _schema_of(named: object) -> object:
    if not isinstance(named, Mapping):
        raise ValueError(f"json_schema must be an object, not {_shown(named)}")
    if unknown := [key for key in named if key not in ("name", "description", "schema", "strict")]:
        raise ValueError(f"json_schema has no key {unknown[0]!r}; the schema itself stands below 'schema'")
    if named.get("schema") is None:
        raise ValueError("json_schema must have the key 'schema'")
    return named["schema"]


@lru_cache(maxsize=256)
def _checked(asked: AnswerFormat) -> AnswerFormat:
    """`asked`, if it can be carried out; the same object for the same format, of which jobs have many."""
    problem = _library().LLMatcher.validate_grammar(asked.grammar())
    if problem:
        at = _place(problem) if asked.kind == "grammar" else ""
        raise ValueError(f"{_NAMES[asked.kind]} cannot be carried out: {at}{_reason(problem)}")
    return asked


_WHERE = re.compile(r"(at )?(\d+)\((\d+)\): (failed to compile JSON schema: |invalid regex .* \(in regex\): )?")
_NAMES: dict[Kind, str] = {
    "json_schema": "the JSON schema",
    "regex": "the regex",
    "choices": "choices",
    "grammar": "the grammar, in Lark's syntax,",
}


def _place(problem: str) -> str:
    """Where in the user's grammar, which stands below a line of ours, the problem is; nothing where that is unknown."""
    found = _WHERE.match(problem)
    return f"line {int(found[2]) - 1}, column {found[3]}: " if found else ""


def _reason(problem: str) -> str:
    """llguidance's words in one line, without the place in a grammar that the user has not written."""
    if found := re.search(r"Unimplemented keys: (\[.*?\])", problem):
        return f"{', '.join(json.loads(found[1]))}: not supported"
    if "oneOf constraints are not supported" in problem:
        return "oneOf: only supported where no two of its schemas can hold at once; anyOf is supported"
    lines = problem.splitlines()
    syntax = (line.removeprefix("error: ") for line in lines if line.startswith("error: "))
    return next(syntax, _WHERE.sub("", lines[0]))


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise EnvironmentProblem(
            "structured answers need llguidance", hint="pip install 'zeroinf[structured]'"
        ) from error
    return llguidance


def _shown(value: object) -> str:
    shown = json.dumps(value, ensure_ascii=False, default=repr)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."
