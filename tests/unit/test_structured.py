"""Formats of answers: what is refused and how it is named, and that every answer that masks allow has its format."""

from __future__ import annotations

import json
import random
import re
import sys
import time
from collections.abc import Sequence
from functools import cache
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zeroinf.errors import EnvironmentProblem
from zeroinf.structured.answer_format import (
    AnswerFormat,
    of_choices,
    of_file,
    of_grammar,
    of_regex,
    of_response_format,
    of_schema,
)
from zeroinf.structured.matcher import AnswerState, Vocabulary

END, SPECIAL = 257, 256
SIZE = 300
MOST = 600
WORDS = (b'":', b'", "', b"true", b"null", b"ab", "é".encode(), b"\xe2\x82", b"[{", b'"}', b"  ")
"""Tokens of several bytes: some hold several terminals of JSON, one a part of a character."""
CLOSING = frozenset(b'"}],')


def piece(token: int) -> bytes | None:
    if token < 256:
        return bytes([token])
    return WORDS[token - 258] if 258 <= token < 258 + len(WORDS) else b"<special>"


@cache
def vocabulary() -> Vocabulary:
    return Vocabulary(piece, SIZE, {SPECIAL, *range(258 + len(WORDS), SIZE)}, {END})


def allowed(answer: AnswerState) -> list[int]:
    """The tokens that may come next."""
    mask = np.zeros((1, answer.vocabulary.words), np.int64)
    answer.vocabulary.fill([(answer, 0)], mask.ctypes.data, 1)
    answer.check()
    assert not answer.problem
    return [int(token) for token in np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))]


def take(answer: AnswerState, token: int) -> None:
    answer.vocabulary.take([(answer, token)])


def written(asked: AnswerFormat, seed: int) -> str | None:
    """An answer of tokens drawn among those allowed, none of them special; None where it found no end."""
    draw, answer, text = random.Random(seed), AnswerState(vocabulary(), asked), b""
    for _ in range(MOST):
        if answer.is_complete:
            return text.decode()
        tokens = allowed(answer)
        assert tokens
        assert all(token == END or piece(token) != b"<special>" for token in tokens)
        # Texts and numbers would hardly ever end where every byte is as likely.
        closing = [token for token in tokens if token == END or (token < 256 and token in CLOSING)]
        token = draw.choice(closing if closing and draw.random() < 0.3 else tokens)
        if token == END:
            return text.decode()
        take(answer, token)
        text += piece(token) or b""
    return None


TREE = {
    "type": "object",
    "properties": {"value": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
    "required": ["value", "next"],
    "additionalProperties": False,
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "any": {},
    "object": {"type": "object"},
    "string": {"type": "string"},
    "integer": {"type": "integer"},
    "number": {"type": "number"},
    "boolean": {"type": "boolean"},
    "null": {"type": "null"},
    "several types": {"type": ["string", "null", "integer"]},
    "enum": {"enum": ["red", 1, None, {"a": [1]}, 'quo"te']},
    "const": {"const": {"a": [1, 2, "ü"]}},
    "minimum": {"type": "integer", "minimum": -3, "maximum": 12},
    "exclusive": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    "multiple": {"type": "integer", "multipleOf": 7},
    "multiple of a fraction": {"type": "number", "multipleOf": 0.25, "minimum": 0, "maximum": 9},
    "lengths": {"type": "string", "minLength": 2, "maxLength": 5},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
    "pattern anywhere": {"type": "string", "pattern": "b+", "maxLength": 6},
    "date": {"type": "string", "format": "date"},
    "date-time": {"type": "string", "format": "date-time"},
    "ipv4": {"type": "string", "format": "ipv4"},
    "uuid": {"type": "string", "format": "uuid"},
    "email": {"type": "string", "format": "email"},
    "items": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    "prefix items": {"type": "array", "prefixItems": [{"type": "integer"}, {"const": "x"}], "items": False},
    "nested arrays": {"type": "array", "items": {"type": "array", "items": {"type": "integer"}, "maxItems": 2}},
    "required": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {}}, "required": ["a", "c"]},
    "closed": {
        "type": "object",
        "properties": {"a": {"type": "string", "maxLength": 3}, "b": {"type": "null"}},
        "additionalProperties": False,
    },
    "additional": {"type": "object", "additionalProperties": {"type": "integer"}},
    "pattern properties": {
        "type": "object",
        "patternProperties": {"^x[0-9]$": {"type": "boolean"}},
        "additionalProperties": False,
    },
    "number of properties": {"type": "object", "maxProperties": 1, "additionalProperties": {"type": "null"}},
    "any of": {"anyOf": [{"type": "integer", "minimum": 3}, {"type": "string", "maxLength": 1}]},
    "one of": {"oneOf": [{"type": "integer"}, {"type": "array", "items": {"type": "null"}}]},
    "all of": {"allOf": [{"properties": {"a": {"type": "integer"}}, "required": ["a"]}, {"type": "object"}]},
    "definitions": {
        "type": "array",
        "items": {"$ref": "#/$defs/point"},
        "minItems": 1,
        "$defs": {"point": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]}},
    },
    "recursive": TREE,
    "annotations": {"title": "A", "description": "b", "default": 1, "examples": [1], "type": "integer", "x-own": {}},
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_answer_that_ends_is_valid(name: str) -> None:
    schema = SCHEMAS[name]
    validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    found = [text for seed in range(12) if (text := written(of_schema(schema), seed)) is not None]
    assert len(found) >= 4
    for text in found:
        validator.validate(json.loads(text))


def test_properties_come_in_the_order_of_the_schema() -> None:
    schema = {"type": "object", "properties": {"z": {"const": 1}, "a": {"const": 2}}, "required": ["a", "z"]}
    text = written(of_schema({**schema, "additionalProperties": False}), 0)
    assert text is not None
    assert list(json.loads(text)) == ["z", "a"]


def test_white_space_never_fills_an_answer() -> None:
    answer = AnswerState(vocabulary(), of_schema({"type": "object"}))
    take(answer, ord("{"))
    for _ in range(40):
        spaces = [token for token in allowed(answer) if (piece(token) or b"x").isspace()]
        if not spaces:
            break
        take(answer, spaces[-1])
    assert not spaces


@pytest.mark.parametrize(
    "pattern",
    ["[a-z]{3}", r"\d+", "^(yes|no)$", "a.b", r"\w{1,4}@x\.org", "x&y|~z", "(?i)oui", "é*!", r"a/b\n", "[^a]"],
)
def test_answers_match_a_regex_as_a_whole(pattern: str) -> None:
    found = [text for seed in range(6) if (text := written(of_regex(pattern), seed)) is not None]
    assert found
    assert all(re.fullmatch(pattern, text) for text in found)


@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=8), min_size=1, max_size=5))
@settings(max_examples=15)
def test_answers_are_one_of_the_choices_whatever_their_characters(choices: list[str]) -> None:
    asked = of_choices(choices)
    assert {written(asked, seed) for seed in range(3)} <= set(choices)
    for choice in choices:
        answer = AnswerState(vocabulary(), asked)
        answer.follow(list(choice.encode()))
        assert not answer.problem
        assert answer.is_complete or END in allowed(answer)


@given(st.text(st.characters(codec="utf-8", exclude_characters="\x7f"), max_size=8))  # DEL is written \u007f
def test_strings_of_json_hold_any_character(text: str) -> None:
    answer = AnswerState(vocabulary(), of_schema({"type": "string"}))
    answer.follow(list(json.dumps(text, ensure_ascii=False).encode()))
    assert answer.is_complete
    assert not answer.problem


def test_an_answer_can_be_taken_up_anywhere() -> None:
    text = b'{"value": 12, "next": null}'
    for at in range(len(text)):
        whole, parts = (AnswerState(vocabulary(), of_schema(TREE)) for _ in range(2))
        whole.follow(list(text[:at]))
        for byte in text[:at]:
            take(parts, byte)
        parts.follow(list(text[:at]))  # it has gone so far already
        assert allowed(whole) == allowed(parts)
        assert END not in allowed(whole)


def test_the_end_is_allowed_only_where_the_answer_may_end() -> None:
    answer = AnswerState(vocabulary(), of_regex("ab*"))
    assert END not in allowed(answer)
    take(answer, ord("a"))
    assert {END, ord("b")} <= set(allowed(answer))
    assert not answer.is_complete


def test_a_model_without_an_end_of_sequence_has_no_such_answers() -> None:
    answer = AnswerState(Vocabulary(piece, SIZE, (), ()), of_regex("a"))
    answer.follow([])
    assert "end-of-sequence" in answer.problem


def test_a_token_that_the_format_forbids_is_a_problem_of_its_answer() -> None:
    answer = AnswerState(vocabulary(), of_regex("ab"))
    take(answer, ord("x"))
    assert "cannot be followed" in answer.problem
    take(answer, ord("a"))
    assert not answer.is_complete


def response_format(**fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": fields}


def test_answers_are_what_a_grammar_makes() -> None:
    sums = of_grammar('start: sum (", " sum)*\nsum: /[0-9]/ " + " /[0-9]/')
    found = [written(sums, seed) for seed in range(20)]
    assert any(found)
    assert all(re.fullmatch(r"\d \+ \d(, \d \+ \d)*", one) for one in found if one is not None)


@pytest.mark.parametrize(
    ("value", "asked"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, of_schema({"type": "object"})),
        (response_format(name="a", strict=True, schema={"type": "null"}), of_schema({"type": "null"})),
        ({"type": "regex", "regex": "a+"}, of_regex("a+")),
        ({"type": "choices", "choices": ["a", "b"]}, of_choices(["a", "b", "a"])),
        ({"type": "grammar", "grammar": "start: /a+/"}, of_grammar("start: /a+/")),
    ],
)
def test_response_formats_as_openai_has_them_and_three_more(value: Any, asked: AnswerFormat | None) -> None:
    assert of_response_format(value) == asked


def test_a_file_holds_a_schema_or_a_response_format() -> None:
    schema = {"type": "object", "properties": {"b": {}, "a": {}}}
    assert of_file(json.dumps(schema)) == of_schema(schema) == of_file(json.dumps(response_format(schema=schema)))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("json", ["must be an object"]),
        ({"type": "yaml"}, ["must have a type", "json_schema", "yaml"]),
        ({"type": "json_object", "schema": {}}, ["json_object has no key 'schema'"]),
        ({"type": "json_schema"}, ["must have the key 'json_schema'"]),
        ({"type": "json_schema", "json_schema": {"type": "object"}}, ["no key 'type'", "below 'schema'"]),
        (response_format(name="a"), ["must have the key 'schema'"]),
        (response_format(schema=[]), ["must be an object"]),
        (response_format(schema={"type": "strin"}), ["Invalid type: strin"]),
        (response_format(schema={"type": "array", "uniqueItems": True}), ["uniqueItems: not supported"]),
        (response_format(schema={"not": {}, "if": {}}), ["if, not: not supported"]),
        (response_format(schema={"items": {"propertees": {}}}), ["'propertees'", "did you mean 'properties'"]),
        (response_format(schema={"anyOf": [{"maxLenght": 1}]}), ["'maxLenght'", "did you mean 'maxLength'"]),
        (response_format(schema={"oneOf": [{}, {}]}), ["oneOf", "anyOf"]),
        (response_format(schema={"$ref": "https://example.org/a"}), ["https://example.org/a"]),
        (response_format(schema={"format": "color", "type": "string"}), ["format: color"]),
        (response_format(schema={"type": "integer", "minimum": 3, "maximum": 2}), ["minimum (3) is greater"]),
        (response_format(schema={"type": "string", "pattern": "(?=a)"}), ["look-around"]),
        (response_format(schema={"x-guidance": {"lenient": True}}), ["x-guidance"]),
        ({"type": "regex", "regex": "a(b"}, ["the regex", "unclosed group"]),
        ({"type": "regex", "regex": ""}, ["not empty"]),
        ({"type": "regex", "regex": r"(a)\1"}, ["backreferences are not supported"]),
        ({"type": "choices", "choices": []}, ["list of texts"]),
        ({"type": "choices", "choices": "yes,no"}, ["list of texts"]),
        ({"type": "choices", "choices": ["a", ""]}, ["not empty"]),
        ({"type": "grammar", "grammar": " "}, ["not empty"]),
        ({"type": "grammar", "grammar": 'start: b\nb: "a" | foo'}, ["Lark", "line 2", "unknown name"]),
        ({"type": "grammar", "grammar": 'root ::= "a"'}, ["Lark", "line 1, column 7: Expected"]),
        ({"type": "grammar", "grammar": 'begin: "a"'}, ["no start rule"]),
        ({"type": "grammar", "grammar": "start: /(/"}, ["line 1, column 8: unclosed group"]),
        ({"type": "grammar", "grammar": '%llguidance {}\nstart: "a"'}, ["%llguidance"]),
    ],
)
def test_what_cannot_be_carried_out_is_refused_by_name(value: Any, words: Sequence[str]) -> None:
    with pytest.raises(ValueError) as caught:
        of_response_format(value)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_names_of_properties_and_values_are_no_keywords() -> None:
    schema = {"properties": {"requird": {"const": {"itms": 1}}, "titel": {"enum": [{"typ": 1}]}}, "default": {"typ": 1}}
    assert of_schema(schema).kind == "json_schema"


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(EnvironmentProblem, match="llguidance") as caught:
        of_regex("only asked for here")
    assert "zeroinf[structured]" in str(caught.value.hint)


def test_a_vocabulary_that_is_read_ahead_is_read_once_and_whoever_needs_it_waits() -> None:
    asked = list[int]()

    def slow(token: int) -> bytes | None:
        if not asked:
            time.sleep(0.1)
        asked.append(token)
        return piece(token)

    read = Vocabulary(slow, SIZE, {SPECIAL}, {END})
    thread = read.read_ahead()
    assert {ord("a")} == set(allowed(AnswerState(read, of_regex("a"))))
    assert thread is not None
    thread.join()
    assert sorted(asked) == [token for token in range(SIZE) if token not in (SPECIAL, END)]
