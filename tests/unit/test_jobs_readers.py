"""What `read_requests` promises for every kind of line."""

from __future__ import annotations

import io
import json
import time
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zeroinf.errors import InputError
from zeroinf.generation.row import Sampling
from zeroinf.jobs.readers import InputFormat, read_requests
from zeroinf.service.requests import Refusal, Request
from zeroinf.structured.answer_format import of_regex, of_schema

DEFAULTS = Sampling(max_new_tokens=16)
CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]


def read(
    source: bytes | None,
    *,
    prompts: tuple[str, ...] = (),
    input_format: InputFormat = "auto",
    name: str = "in.jsonl",
    defaults: Sampling = DEFAULTS,
) -> tuple[list[Request], list[Refusal]]:
    stream = None if source is None else io.BytesIO(source)
    return read_requests(prompts, stream, defaults, input_format=input_format, name=name)


def read_object(entry: dict[str, Any]) -> Request:
    (request,), refusals = read(json.dumps(entry).encode())
    assert not refusals
    return request


def refuse(line: bytes) -> str:
    """The reason for which `line` is refused, after checking that the line after it is still read."""
    requests, (refusal,) = read(line + b'\n{"prompt": "next"}\n')
    assert [(request.index, request.prompt) for request in requests] == [(1, "next")]
    assert (refusal.index, refusal.line) == (0, 1)
    assert "\n" not in refusal.reason
    return refusal.reason


def refuse_object(entry: dict[str, Any]) -> str:
    return refuse(json.dumps(entry).encode())


def refuse_body(**body: Any) -> str:
    return refuse_object({"custom_id": "a", "method": "POST", "url": CHAT, "body": {"messages": HI, **body}})


# Text


@pytest.mark.parametrize(
    ("source", "prompts"),
    [
        (b"one\ntwo\n", ["one", "two"]),
        (b"one\ntwo", ["one", "two"]),
        (b"one\r\ntwo\r\n", ["one", "two"]),
        (b"\xef\xbb\xbfone\n", ["one"]),
        (b"\xef\xbb\xbf\none\n", ["one"]),
        (b"\n  \none\n\n", ["one"]),
        (b"  one \t\n", ["  one \t"]),
        ("über \u2028 x\n".encode(), ["über \u2028 x"]),
        (b"[1, 2]\n", ["[1, 2]"]),
    ],
)
def test_text_is_a_prompt_a_line(source: bytes, prompts: list[str]) -> None:
    requests, refusals = read(source, name="in.txt")
    assert [request.prompt for request in requests] == prompts
    assert all(request.messages is None and request.sampling is DEFAULTS for request in requests)
    assert not refusals


def test_invalid_utf8_refuses_its_line_only() -> None:
    requests, (refusal,) = read(b"one\ntw\xff\nthree\n", name="in.txt")
    assert [(request.index, request.id, request.prompt) for request in requests] == [
        (0, "request-1", "one"),
        (2, "request-3", "three"),
    ]
    assert refusal == Refusal(index=1, line=2, id=None, reason="not UTF-8: byte 0xff at position 3")


# The format


@pytest.mark.parametrize(
    ("name", "source", "input_format", "prompt"),
    [
        ("in.jsonl", b'{"prompt": "a"}', "auto", "a"),
        ("IN.NDJSON", b'{"prompt": "a"}', "auto", "a"),
        ("in.json", b'{"prompt": "a"}', "auto", "a"),
        ("<stdin>", b'\n\n{"prompt": "a"}', "auto", "a"),
        ("<stdin>", b'\xef\xbb\xbf{"prompt": "a"}', "auto", "a"),
        ("<stdin>", b'"a"', "auto", '"a"'),
        ("<stdin>", b"{a}", "auto", "{a}"),
        ("<stdin>", b"[" * 100_000, "auto", "[" * 100_000),
        ("in.txt", b'{"prompt": "a"}', "text", '{"prompt": "a"}'),
        ("in.jsonl", b"a", "text", "a"),
        ("in.txt", b'{"prompt": "a"}', "jsonl", "a"),
    ],
)
def test_format_follows_flag_then_name_then_first_line(
    name: str, source: bytes, input_format: InputFormat, prompt: str
) -> None:
    (request,), _ = read(source, name=name, input_format=input_format)
    assert request.prompt == prompt


@pytest.mark.parametrize("name", ["in.jsonl", "IN.NDJSON", "in.json"])
def test_jsonl_by_name_refuses_text(name: str) -> None:
    _, (refusal,) = read(b"hello", name=name)
    assert refusal.reason == "not JSON: Expecting value at column 1"


# Our own lines


@pytest.mark.parametrize(
    ("settings", "changed"),
    [
        ({"max_new_tokens": 5}, {"max_new_tokens": 5}),
        ({"max_tokens": 5}, {"max_new_tokens": 5}),
        ({"max_completion_tokens": 5}, {"max_new_tokens": 5}),
        ({"max_tokens": 5, "max_completion_tokens": 5}, {"max_new_tokens": 5}),
        ({"temperature": 0.5}, {"temperature": 0.5}),
        ({"temperature": 1}, {"temperature": 1.0}),
        ({"temperature": 0}, {"temperature": 0.0}),
        ({"top_p": 0.9, "top_k": 40}, {"top_p": 0.9, "top_k": 40}),
        ({"seed": 7}, {"seed": 7}),
        ({"stop": "x"}, {"stop": ("x",)}),
        ({"stop": ["x", "y"]}, {"stop": ("x", "y")}),
        ({"stop": []}, {"stop": ()}),
        ({"ignore_eos": False}, {"ignore_eos": False}),
        ({"temperature": None, "stop": None}, {}),
    ],
)
@pytest.mark.parametrize("batch", [False, True])
def test_settings_of_a_line_win_over_the_defaults(
    settings: dict[str, Any], changed: dict[str, Any], batch: bool
) -> None:
    standing = {"max_new_tokens": 16, "temperature": 0.7, "stop": ("d",), "ignore_eos": True}
    entry = {"prompt": "a", **settings}
    line = {"body": entry} if batch else entry
    (request,), _ = read(json.dumps(line).encode(), defaults=Sampling(**standing))
    assert request.sampling == Sampling(**{**standing, **changed})


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("hi", "hi"),
        ("", ""),
        ([{"type": "text", "text": "hi"}], "hi"),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "a\nb"),
    ],
)
def test_message_content_becomes_text(content: object, text: str) -> None:
    request = read_object({"messages": [{"role": "system", "content": content}, *HI]})
    assert request.messages == ({"role": "system", "content": text}, {"role": "user", "content": "hi"})
    assert request.prompt is None


def test_nulls_of_openai_messages_are_absent() -> None:
    request = read_object({"messages": [{"role": "assistant", "content": "a", "tool_calls": None, "refusal": None}]})
    assert request.messages == ({"role": "assistant", "content": "a"},)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt": "a"', "not JSON: Expecting ',' delimiter at column 15"),
        (b"[1]", "must be a JSON object, not [1]"),
        (b"null", "must be a JSON object, not None"),
        (b'{"prompt": "a", "seed": NaN}', "not JSON: NaN"),
        (b'{"prompt": "a", "temperature": 1e999}', "temperature must be a finite number, not inf"),
        (b'{"prompt": "a", "prompt": "b"}', "key 'prompt' stands twice in one object"),
        (b'{"prompt": "\xff"}', "not UTF-8: byte 0xff at position 13"),
        (b'{"prompt": "\\ud800"}', "prompt must be valid Unicode, without half surrogate pairs, not '\\ud800'"),
        (b'{"prompt": "a", "x": ' + b"[" * 100_000, "not JSON: nested too deeply"),
    ],
)
def test_a_malformed_line_is_refused_and_does_not_stop_the_job(line: bytes, reason: str) -> None:
    assert refuse(line) == reason


def test_an_endless_integer_is_refused() -> None:
    assert refuse(b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}").startswith("not JSON: Exceeds the limit")


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({}, "neither prompt nor messages is given"),
        ({"prompt": None}, "neither prompt nor messages is given"),
        ({"prompt": ""}, "prompt must not be empty, not ''"),
        ({"prompt": 5}, "prompt must be a string, or a list of strings or of token ids, not 5"),
        ({"prompt": []}, "prompt must be a string, or a list of strings or of token ids, not []"),
        ({"prompt": ["a", 1]}, "prompt must be a string, or a list of strings or of token ids, not ['a', 1]"),
        ({"prompt": [1, -1]}, "prompt must be a string, or a list of strings or of token ids, not [1, -1]"),
        ({"prompt": ["a", ""]}, "prompt must not be empty, not ['a', '']"),
        ({"prompt": "a", "messages": HI}, "prompt and messages are both given"),
        ({"messages": []}, "messages is empty"),
        ({"messages": "hi"}, "messages must be a list, not 'hi'"),
        ({"messages": ["hi"]}, "messages[0] must be an object, not 'hi'"),
        ({"messages": [{"role": "user"}]}, "messages[0].content is missing"),
        (
            {"messages": [*HI, {"role": "tool", "content": "x"}]},
            "messages[1].role must be 'system', 'developer', 'user' or 'assistant', not 'tool'",
        ),
        (
            {"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]},
            "unknown key 'messages[0].tool_calls'",
        ),
        ({"prompt": "a", "text": 1}, "unknown key 'text'; did you mean 'prompt'?"),
        ({"promt": "a"}, "unknown key 'promt'; did you mean 'prompt'?"),
        ({"prompt": "a", "max_token": 1}, "unknown key 'max_token'; did you mean 'max_tokens'?"),
        ({"prompt": "a", "n": 0}, "n must lie between 1 and 128, not 0"),
        (
            {"prompt": "a", "n": 2},
            "n=2 completions of a greedy request would be equal: set a temperature",
        ),
        ({"prompt": "a", "min_length": 3}, "unknown key 'min_length'; did you mean 'min_tokens'?"),
        ({"prompt": "a", "stop_sequences": ["x"]}, "unknown key 'stop_sequences'; did you mean 'stop'?"),
        ({"prompt": "a", "repeat_penalty": 1}, "unknown key 'repeat_penalty'; did you mean 'repetition_penalty'?"),
        ({"prompt": "a", "min_tokens": 17}, "min_tokens must lie between 0 and max_new_tokens (16), not 17"),
        ({"prompt": "a", "presence_penalty": 3}, "presence_penalty must lie between -2 and 2, not 3"),
        ({"prompt": "a", "repetition_penalty": 0}, "repetition_penalty must lie above 0 and at most at 100, not 0"),
        ({"prompt": "a", "min_p": 1.5}, "min_p must lie between 0 and 1, not 1.5"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias must have token ids as keys and numbers as values"),
        ({"prompt": "a", "logit_bias": {"5": 101}}, "logit_bias must lie between -100 and 100"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens must be at least 1, not 0"),
        ({"prompt": "a", "max_completion_tokens": -1}, "max_completion_tokens must be at least 1, not -1"),
        ({"prompt": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens must be at least 1, not 0"),
        (
            {"prompt": "a", "echo": True, "logprobs": 1},
            "echo=True with logprobs, those of the prompt, is not",
        ),
        ({"prompt": "a", "a\nb": 1}, "unknown key 'a\\nb'"),
        ({"prompt": "a", "temperature": "0.5"}, "temperature must be a number, not '0.5'"),
        ({"prompt": "a", "temperature": True}, "temperature must be a number, not True"),
        ({"prompt": "a", "top_k": True}, "top_k must be an integer, not True"),
        ({"prompt": "a", "max_new_tokens": 16.0}, "max_new_tokens must be an integer, not 16.0"),
        ({"prompt": "a", "ignore_eos": 1}, "ignore_eos must be true or false, not 1"),
        ({"prompt": "a", "stop": [1]}, "stop[0] must be a string, not 1"),
        ({"prompt": "a", "stop": ""}, "stop[0] must not be empty, not ''"),
        ({"prompt": "a", "stop": 1}, "stop must be a list, not 1"),
        ({"prompt": "a", "id": True}, "id must be a string or an integer, not True"),
        ({"prompt": "a", "id": ""}, "id must not be empty, not ''"),
        ({"prompt": "a", "seed": "x", "top_k": "y"}, "top_k must be an integer, not 'y' (and 1 more)"),
        (
            {"prompt": "a", "max_tokens": 5, "max_new_tokens": 6},
            "max_new_tokens=6 and max_tokens=5 contradict each other",
        ),
    ],
)
def test_a_line_that_cannot_be_run_is_refused_with_its_reason(entry: dict[str, Any], reason: str) -> None:
    assert refuse_object(entry).startswith(reason)


@pytest.mark.parametrize(
    "part",
    [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "text"}, {"type": "text", "text": 1}, "hi"],
)
def test_content_other_than_text_is_refused(part: object) -> None:
    reason = refuse_object({"messages": [{"role": "user", "content": [part]}]})
    assert reason.startswith("messages[0].content must be a string or a list of text parts, not [")


@pytest.mark.parametrize(
    ("name", "value"), [("max_new_tokens", 0), ("temperature", -1), ("top_p", -0.1), ("top_p", 1.5), ("top_k", -2)]
)
def test_a_setting_out_of_range_is_refused_by_name_and_value(name: str, value: float) -> None:
    reason = refuse_object({"prompt": "a", name: value})
    assert reason.startswith(f"{name} must") and str(value) in reason


def test_a_long_value_is_shortened_in_the_reason() -> None:
    assert len(refuse_object({"prompt": "a", "seed": "x" * 10_000})) < 100


# OpenAI batch lines


def test_openai_batch_lines_are_read_as_they_are() -> None:
    body = {"model": "gpt-4o", "messages": HI, "max_tokens": 9, "temperature": 0.2}
    request = read_object({"custom_id": "r1", "method": "POST", "url": CHAT, "body": body})
    assert (request.id, request.messages) == ("r1", ({"role": "user", "content": "hi"},))
    assert request.sampling == Sampling(max_new_tokens=9, temperature=0.2)


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("a", [("a", None)]),
        (["a"], [("a", None)]),
        (["a", "b"], [("a", None), ("b", None)]),
        ([5, 6], [(None, (5, 6))]),
        ([[5], [6, 7]], [(None, (5,)), (None, (6, 7))]),
    ],
)
def test_openai_completion_prompts(prompt: object, found: list[Any]) -> None:
    line = {"custom_id": "r", "url": "/v1/completions", "body": {"prompt": prompt}}
    requests, _ = read(json.dumps(line).encode() + b'\n{"prompt": "next"}')
    assert [(request.prompt, request.tokens) for request in requests[:-1]] == found
    assert [request.index for request in requests] == list(range(len(found) + 1))
    assert {request.id for request in requests[:-1]} == {"r"}
    choices = [request.extra and request.extra.choice for request in requests[:-1]]
    assert choices == ([None] if len(found) == 1 else list(range(len(found))))


def test_samples_of_each_prompt_stand_together() -> None:
    requests, _ = read(b'{"prompt": ["a", "b"], "n": 2, "temperature": 1}')
    assert [(one.index, one.prompt, one.extra and one.extra.choice) for one in requests] == [
        (0, "a", 0),
        (1, "a", 1),
        (2, "b", 2),
        (3, "b", 3),
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"url": "/chat/completions"},
        {"url": "v1/chat/completions"},
        {"url": "https://api.example.com/v1/chat/completions"},
        {"url": "/v1/chat/completions/"},
        {"url": "https://x.example/openai/deployments/m/chat/completions?api-version=2024"},
        {"method": "post"},
    ],
)
def test_every_way_to_write_a_url_or_method_is_understood(change: dict[str, str]) -> None:
    request = read_object({"custom_id": "a", "method": "POST", "url": CHAT, "body": {"messages": HI}, **change})
    assert request.messages == tuple(HI)
    assert request.extra is not None and request.extra.endpoint == "chat"


def test_settings_of_requests_reach_their_sampling() -> None:
    asked: dict[str, Any] = {
        "presence_penalty": 0.5,
        "frequency_penalty": -1,
        "repetition_penalty": 1.1,
        "min_p": 0.1,
        "min_tokens": 2,
        "stop_token_ids": [7, 8],
        "skip_special_tokens": False,
    }
    request = read_object(
        {"prompt": "a", **asked, "logit_bias": {"10": 5, "2": -1.5}, "include_stop_str_in_output": True, "echo": True,
         "truncate_prompt_tokens": 3, "temperature": 0.5}
    )  # fmt: skip
    assert request.sampling == Sampling(
        max_new_tokens=16,
        temperature=0.5,
        **{**asked, "stop_token_ids": (7, 8)},
        logit_bias=((2, -1.5), (10, 5.0)),
        include_stop=True,
    )
    assert (request.truncate, request.extra and request.extra.echo) == (3, True)


@pytest.mark.parametrize(("asked", "sampling"), [({"top_k": -1}, {}), ({"top_p": 0}, {"temperature": 0.0})])
def test_values_that_other_programs_use_mean_the_same(asked: dict[str, Any], sampling: dict[str, Any]) -> None:
    defaults = Sampling(max_new_tokens=16, temperature=0.7)
    (request,), _ = read(json.dumps({"prompt": "a", **asked}).encode(), defaults=defaults)
    assert request.sampling == replace(defaults, **sampling)


def test_messages_may_have_names() -> None:
    message = {"role": "user", "name": "ann", "content": "hi", "annotations": [], "tool_calls": []}
    assert read_object({"messages": [message]}).messages == ({"role": "user", "content": "hi", "name": "ann"},)


HARMLESS = {
    "model": "m",
    "user": "u",
    "metadata": {"a": "b"},
    "store": True,
    "n": 1,
    "best_of": 1,
    "echo": False,
    "frequency_penalty": 0,
    "presence_penalty": 0.0,
    "logit_bias": {},
    "logprobs": False,
    "top_logprobs": 0,
    "tools": [],
    "tool_choice": "none",
    "response_format": {"type": "text"},
    "stream": False,
    "reasoning_effort": None,
    "min_tokens": 0,
    "skip_special_tokens": True,
    "length_penalty": 1,
    "include_stop_str_in_output": False,
    "guided_json": None,
    "parallel_tool_calls": True,
}


@pytest.mark.parametrize("key", HARMLESS)
@pytest.mark.parametrize("batch", [False, True])
def test_settings_that_ask_for_nothing_are_accepted(key: str, batch: bool) -> None:
    body = {"prompt" if key == "echo" else "messages": "a" if key == "echo" else HI, key: HARMLESS[key]}
    assert read_object({"custom_id": "r", "body": body} if batch else body).sampling is DEFAULTS


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("best_of", 3),
        ("length_penalty", 2),
        ("suffix", "x"),
        ("guided_regex", "x*"),
        ("tools", [{}]),
        ("tool_choice", "required"),
        ("stream", True),
    ],
)
def test_settings_that_we_do_not_do_are_refused_by_name(key: str, value: object) -> None:
    reason = refuse_body(**{key: value})
    assert reason.startswith(f"{key}=") and "is not supported" in reason


def test_a_format_of_answers_is_a_setting_of_its_line() -> None:
    schema = {"type": "object", "properties": {"b": {}, "a": {}}}
    asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    job = Sampling(max_new_tokens=9, answer_format=of_regex("a+"))
    lines = [
        {"prompt": "a"},
        {"prompt": "b", "response_format": asked},
        {"prompt": "c", "response_format": {"type": "text"}},
    ]
    requests, refusals = read("\n".join(map(json.dumps, lines)).encode(), defaults=job)
    assert not refusals
    assert [one.sampling.answer_format for one in requests] == [of_regex("a+"), of_schema(schema), None]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"type": "json_schema", "json_schema": {"schema": {"uniqueItems": True}}}, "uniqueItems: not supported"),
        ({"type": "yaml"}, "must have a type"),
        ("json_object", "must be an object"),
    ],
)
def test_a_format_that_cannot_be_carried_out_is_refused_by_its_line(value: object, words: str) -> None:
    reason = refuse_body(response_format=value)
    assert reason.startswith("response_format")
    assert words in reason
    assert "stop with response_format" in refuse_body(response_format={"type": "json_object"}, stop="x")
    assert "response_format does it" in refuse_body(guided_regex="x*")


@pytest.mark.parametrize(
    ("body", "default", "logprobs"),
    [
        ({}, 3, 3),
        ({"logprobs": None}, 3, 3),
        ({"logprobs": 0}, None, 0),
        ({"logprobs": 20}, 3, 20),
        ({"logprobs": False}, 3, None),
        ({"logprobs": True}, None, 0),
        ({"logprobs": True, "top_logprobs": 5}, None, 5),
    ],
)
@pytest.mark.parametrize("batch", [False, True])
def test_logprobs_are_asked_for_as_completions_and_as_chats_do(
    body: dict[str, Any], default: int | None, logprobs: int | None, batch: bool
) -> None:
    entry = {"prompt": "a", **body}
    (request,), _ = read(
        json.dumps({"body": entry} if batch else entry).encode(), defaults=Sampling(max_new_tokens=1, logprobs=default)
    )
    assert request.sampling.logprobs == logprobs


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"logprobs": 21}, "logprobs must lie between 0 and 20, not 21"),
        ({"logprobs": True, "top_logprobs": -1}, "logprobs must lie between 0 and 20, not -1"),
        ({"logprobs": "yes"}, "logprobs must be true, false or an integer, not 'yes'"),
        ({"top_logprobs": 2}, "top_logprobs=2 needs logprobs=true"),
        ({"logprobs": 4, "top_logprobs": 2}, "top_logprobs=2 needs logprobs=true"),
    ],
)
def test_logprobs_that_cannot_be_told_are_refused(body: dict[str, Any], reason: str) -> None:
    assert refuse_body(**body) == reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"url": "/v1/embeddings"}, "url must be '/v1/chat/completions' or '/v1/completions', not '/v1/embeddings'"),
        ({"method": "GET"}, "method must be 'POST', not 'GET'"),
        ({"url": "/v1/completions"}, "/v1/completions takes prompt, which is missing"),
        ({"url": CHAT, "body": {"prompt": "a"}}, "/v1/chat/completions takes messages, which is missing"),
        ({"body": "x"}, "body must be an object, not 'x'"),
        ({"body": {"messages": HI, "max_token": 1}}, "unknown key 'max_token'; did you mean 'max_tokens'?"),
        ({"prompt": "a"}, "unknown key 'prompt'"),
    ],
)
def test_openai_lines_that_cannot_be_run(change: dict[str, Any], reason: str) -> None:
    refused = refuse_object({"custom_id": "a", "method": "POST", "url": CHAT, "body": {"messages": HI}, **change})
    assert refused.startswith(reason)


def test_openai_line_without_body() -> None:
    assert refuse_object({"custom_id": "a"}) == "body is missing"


# Ids


def test_ids_are_given_or_made_from_the_line() -> None:
    requests, _ = read(b'{"prompt": "a", "id": "x"}\n\n{"prompt": "b"}\n{"prompt": "c", "id": 7}\n')
    assert [(request.index, request.line, request.id) for request in requests] == [
        (0, 1, "x"),
        (1, 3, "request-3"),
        (2, 4, "7"),
    ]


def test_a_given_id_wins_over_a_made_one() -> None:
    requests, refusals = read(b'{"prompt": "a"}\n{"prompt": "b", "id": "request-1"}\n')
    assert [request.id for request in requests] == ["request-1-2", "request-1"]
    assert not refusals


def test_the_later_of_two_equal_ids_is_refused_naming_the_first() -> None:
    requests, refusals = read(
        b'{"prompt": "a", "id": 7}\n{"prompt": "b"}\n{"custom_id": "7", "body": {"prompt": "c"}}\n'
    )
    assert [request.prompt for request in requests] == ["a", "b"]
    assert refusals == [Refusal(index=2, line=3, id="7", reason="id '7' was already given on line 1")]


def test_the_id_of_a_refused_line_may_come_again() -> None:
    requests, refusals = read(b'{"prompt": "", "id": "a"}\n{"prompt": "x", "id": "a"}\n')
    assert ([request.id for request in requests], [refusal.id for refusal in refusals]) == (["a"], ["a"])


@pytest.mark.parametrize(
    ("entry", "id_"),
    [
        ({"id": "a", "seed": "x", "prompt": "p"}, "a"),
        ({"id": 3, "prompt": "p", "top_k": -2}, "3"),
        ({"custom_id": "b", "body": {"prompt": "p", "n": 2}}, "b"),
        ({"id": [], "prompt": "p"}, None),
    ],
)
def test_a_refusal_carries_the_id_of_its_line(entry: dict[str, Any], id_: str | None) -> None:
    _, (refusal,) = read(json.dumps(entry).encode())
    assert refusal.id == id_


@given(
    st.lists(st.one_of(st.none(), st.sampled_from(["request-1", "request-2", "request-1-2", "x"]), st.integers(0, 3)))
)
def test_every_line_is_a_request_or_a_refusal_and_ids_are_unique(ids: list[str | int | None]) -> None:
    lines = [json.dumps({"prompt": "p", "id": id_}).encode() for id_ in ids]
    requests, refusals = read(b"\n".join(lines), prompts=("first",))
    assert sorted(entry.index for entry in (*requests, *refusals)) == list(range(len(ids) + 1))
    assert len({request.id for request in requests}) == len(requests)
    assert {str(id_) for id_ in ids if id_ is not None} <= {request.id for request in requests}


# The whole input


def test_prompts_come_before_the_file() -> None:
    requests, _ = read(b'{"prompt": "c"}\n', prompts=("a", '{"prompt": "b"}'))
    assert [(request.index, request.line, request.prompt) for request in requests] == [
        (0, None, "a"),
        (1, None, '{"prompt": "b"}'),
        (2, 1, "c"),
    ]
    assert [request.id for request in requests] == ["request-1", "request-2", "request-1-2"]


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [("", "prompt must not be empty"), ("\udcff", "prompt must be valid Unicode, without half surrogate pairs")],
)
def test_a_prompt_that_cannot_be_run_is_refused(prompt: str, reason: str) -> None:
    requests, refusals = read(None, prompts=("a", prompt))
    assert [request.prompt for request in requests] == ["a"]
    assert refusals == [Refusal(index=1, line=None, id=None, reason=reason)]


@pytest.mark.parametrize("source", [None, b"", b"\n \r\n", b"\xef\xbb\xbf"])
def test_an_input_with_nothing_in_it_is_an_error(source: bytes | None) -> None:
    with pytest.raises(InputError, match=r"^empty input"):
        read(source)


def test_an_input_of_refusals_only_is_not_empty() -> None:
    requests, refusals = read(b"oops\n")
    assert (requests, len(refusals)) == ([], 1)


@given(st.binary())
def test_no_bytes_stop_the_reader(source: bytes) -> None:
    try:
        requests, refusals = read(source)
    except InputError:
        return
    assert sorted(entry.index for entry in (*requests, *refusals)) == list(range(len(requests) + len(refusals)))


def test_ten_times_the_lines_take_about_ten_times_as_long() -> None:
    line = json.dumps({"custom_id": 0, "url": CHAT, "body": {"messages": HI, "max_tokens": 9, "seed": 1}})

    def taken_s(count: int) -> float:
        source = b"".join(line.replace("0", str(number), 1).encode() + b"\n" for number in range(count))
        started = time.process_time()
        assert len(read(source)[0]) == count
        return time.process_time() - started

    assert taken_s(50_000) < 40 * taken_s(5_000)  # the square would be a hundred times
