"""What columns, templates, system messages and chat options make of the entries of an input."""

from __future__ import annotations

import io
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from zeroinf.errors import InputError, UsageError
from zeroinf.generation.row import Sampling
from zeroinf.jobs.inputs import InputFile
from zeroinf.jobs.readers import InputRequests, read_inputs
from zeroinf.jobs.shape import EntryShape
from zeroinf.service.requests import ChatOptions, Refusal, Request

DEFAULTS = Sampling(max_new_tokens=16)
HI = [{"role": "user", "content": "hi"}]


def read_all(*entries: Any, name: str = "in.jsonl", prompts: tuple[str, ...] = (), **shape: Any) -> InputRequests:
    lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    source = io.BytesIO("\n".join(lines).encode())
    files = [InputFile(name, lambda: nullcontext(source))] if entries else []
    return read_inputs(prompts, files, DEFAULTS, shape=EntryShape(**shape))


def read(*entries: Any, **how: Any) -> tuple[list[Request], list[Refusal]]:
    found = list(read_all(*entries, **how))
    requests = [entry for entry in found if isinstance(entry, Request)]
    return requests, [entry for entry in found if isinstance(entry, Refusal)]


def one(entry: Any, **how: Any) -> Request:
    (request,), refusals = read(entry, **how)
    assert not refusals
    return request


def kept(entry: Any, **how: Any) -> Any:
    extra = one(entry, **how).extra
    assert extra is not None
    return extra.columns


def reason(entry: Any, **how: Any) -> str:
    requests, (refusal,) = read(entry, **how)
    assert not requests
    return refusal.reason


# Columns


def test_columns_that_nothing_uses_are_left_out_and_named() -> None:
    found = read_all({"prompt": "Say hi", "label": 1}, {"prompt": "b", "source": "x", "label": 2})
    assert [(request.prompt, request.extra) for request in found] == [("Say hi", None), ("b", None)]
    assert found.unused == ("label", "source")


@pytest.mark.parametrize(
    ("entry", "shape", "prompt"),
    [
        ({"text": "a", "label": 1}, {"prompt_column": "text"}, "a"),
        ({"text": "a", "prompt": "b"}, {"prompt_column": "text"}, "a"),
        (
            {"instruction": "Add.", "input": "1, 2", "output": "3"},
            {"template": "{{ instruction }}{% if input %}\n{{ input }}{% endif %}"},
            "Add.\n1, 2",
        ),
        ({"prompt": "a", "n": [1, 2]}, {"template": "{{ prompt }} {{ n | tojson }} {{ n[1] }}"}, "a [1, 2] 2"),
    ],
)
def test_the_prompt_is_made_of_columns(entry: dict[str, Any], shape: dict[str, Any], prompt: str) -> None:
    assert one(entry, **shape).prompt == prompt


def test_a_template_may_be_a_file_and_takes_plain_text_as_prompt(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("<{{ prompt }}>\n")
    request = one("hello {{ x }}", name="in.txt", template=f"@{tmp_path / 't.jinja'}")
    assert request.prompt == "<hello {{ x }}>"
    assert read(prompts=("a",), template="{{ prompt }}!")[0][0].prompt == "a!"


def test_settings_and_ids_of_an_entry_stand_beside_its_columns() -> None:
    request = one({"text": "a", "key": 7, "temperature": 0.5}, prompt_column="text", id_column="key")
    assert (request.id, request.sampling.temperature) == ("7", 0.5)
    chat = one({"talk": HI, "prompt": "not this"}, messages_column="talk")
    assert (chat.prompt, chat.messages) == (None, tuple(HI))


def test_columns_are_kept_by_name_or_all() -> None:
    entry = {"id": "x", "text": "a", "label": 1, "more": {"deep": [float("1.5"), None]}}
    assert kept(entry, prompt_column="text", keep=("label", "absent")) == {"label": 1}
    assert kept(entry, prompt_column="text", keep=("all",)) == {
        "text": "a",
        "label": 1,
        "more": {"deep": [1.5, None]},
    }


@pytest.mark.parametrize(
    ("entry", "shape", "words"),
    [
        ({"text": "a"}, {}, "neither prompt nor messages is given, but text: --prompt-column"),
        ({"prompt": "a", "max_token": 1}, {}, "unknown key 'max_token'; did you mean 'max_tokens'?"),
        ({"promt": "a"}, {}, "unknown key 'promt'; did you mean 'prompt'?"),
        ({"a": 1, "b": 2}, {"prompt_column": "c"}, "column 'c' is missing; there are: a, b"),
        ({"a": 1}, {"prompt_column": "a"}, "prompt must be a string, or a list of"),
        ({"a": 1}, {"template": "{{ b }}"}, "the template cannot be filled: 'b' is undefined"),
        ({"a": 1}, {"template": "{{ a / 0 }}"}, "the template cannot be filled: division by zero"),
        ({"a": ""}, {"template": "{{ a }}"}, "prompt must not be empty"),
        ({"a": 1}, {"template": "{{ a.__class__.__mro__ }}"}, "the template cannot be filled: access to attribute"),
        ({"prompt": "a", "completion": "b"}, {"keep": ("all",)}, "column 'completion' cannot be kept"),
        ({"prompt": "a"}, {"system": "s"}, "--system is for chats"),
        ({"prompt": "a", "enable_thinking": False}, {}, "enable_thinking is for messages"),
        ({"messages": HI, "chat_template_kwargs": {"tools": []}}, {}, "chat_template_kwargs may not set 'tools'"),
        (
            {"messages": HI, "add_generation_prompt": True, "continue_final_message": True},
            {},
            "add_generation_prompt and continue_final_message contradict each other",
        ),
    ],
)
def test_an_entry_that_makes_no_prompt_is_refused(entry: Any, shape: dict[str, Any], words: str) -> None:
    assert reason(entry, **shape).startswith(words)


def test_a_column_that_the_template_reads_is_no_setting() -> None:
    request = one({"city": "Oslo", "temperature": 31, "seed": 4}, template="{{ city }}: {{ temperature }}")
    assert (request.prompt, request.sampling.temperature, request.sampling.seed) == ("Oslo: 31", 0.0, 4)


def test_text_has_no_columns() -> None:
    assert (
        reason("a", name="in.txt", prompt_column="text")
        == "a line of text has no columns, which --prompt-column asks for"
    )


def test_a_misspelt_setting_that_the_user_keeps_is_a_column() -> None:
    assert kept({"prompt": "a", "max_token": 1}, keep=("max_token",)) == {"max_token": 1}


@pytest.mark.parametrize(
    ("shape", "error", "words"),
    [
        ({"template": "x", "prompt_column": "y"}, UsageError, "--template and --prompt-column contradict"),
        ({"template": "{{ x"}, UsageError, "is no Jinja2"),
        ({"template": "@/absent"}, InputError, "--template @/absent: No such file"),
        ({"keep": ("id",)}, UsageError, "the output has a key of that name"),
        ({"keep": ("all", "x")}, UsageError, "names all of them"),
    ],
)
def test_a_shape_that_cannot_work_ends_the_job(shape: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        read({"prompt": "a"}, **shape)


def test_limit_counts_entries_refused_ones_included() -> None:
    requests, refusals = read({"prompt": "a"}, "oops", {"prompt": "b"}, prompts=("first",), limit=3)
    assert [request.prompt for request in requests] == ["first", "a"]
    assert [refusal.index for refusal in refusals] == [2]


# Chats


def test_prompts_become_chats() -> None:
    (first, second), _ = read({"prompt": "a"}, prompts=("first",), chat=True, system="s")
    assert first.messages == ({"role": "system", "content": "s"}, {"role": "user", "content": "first"})
    assert (second.prompt, second.messages and second.messages[1]["content"]) == (None, "a")


def test_a_chat_keeps_its_own_system_message() -> None:
    own = [{"role": "developer", "content": "d"}, *HI]
    assert one({"messages": own}, system="s").messages == tuple(own)
    assert one({"messages": HI}, system="s").messages == ({"role": "system", "content": "s"}, *HI)
    assert one({"custom_id": "x", "body": {"prompt": "a"}}, chat=True).messages == ({"role": "user", "content": "a"},)


def test_variables_of_templates_are_those_of_the_line_over_those_of_the_job() -> None:
    job = ChatOptions().with_variables({"enable_thinking": True, "style": "x"})
    line = {"messages": HI, "chat_template_kwargs": {"style": "y"}, "enable_thinking": False, "reasoning_effort": "low"}
    assert one(line, chat_options=job).chat.variables == (
        ("enable_thinking", "false"),
        ("reasoning_effort", '"low"'),
        ("style", '"y"'),
    )
    assert one({"messages": HI}, chat_options=job).chat is job


def test_a_last_message_is_gone_on_with() -> None:
    chat = one({"messages": [*HI, {"role": "assistant", "content": "We"}], "continue_final_message": True}).chat
    assert chat == ChatOptions(add_generation_prompt=False, continue_final_message=True)
