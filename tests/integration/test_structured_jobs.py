"""Jobs whose answers have a format: JSON lines, OpenAI batches, flags and Python, reports, and journals that go on."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from click.testing import CliRunner
from launching import read_jsonl, write_jsonl
from observers import Notes
from ranks import on_ranks
from serving import serving
from small_models import build_tokenizer

import zeroinf
from zeroinf.cli.main import cli
from zeroinf.distributed.control import Control
from zeroinf.distributed.world import World
from zeroinf.errors import RequestsFailedError, UsageError
from zeroinf.generation.row import Sampling
from zeroinf.jobs.output_files import errors_path, journal_path
from zeroinf.options.options import RunOptions
from zeroinf.runs.runner import run_job
from zeroinf.structured.answer_format import of_choices, of_regex
from zeroinf.structured.matcher import Vocabulary

SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["ok", "n"],
    "additionalProperties": False,
}
SPACES = {str(build_tokenizer().convert_tokens_to_ids(name)): -50 for name in "ĉĊčĠ"}
"""Random models like white space as well as anything."""
ASKED = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
LINES: list[dict[str, Any]] = [
    {"prompt": "one", "response_format": ASKED, "logit_bias": SPACES},
    {"prompt": "two"},
    {"prompt": "three", "response_format": {"type": "choices", "choices": ["yes", "no"]}},
    {"prompt": "four", "response_format": {"type": "regex", "regex": "[a-c]{2}x"}, "temperature": 1, "n": 2},
    {"prompt": "five", "response_format": ASKED, "max_tokens": 2},
    {"prompt": "six", "response_format": {"type": "json_schema", "json_schema": {"schema": {"uniqueItems": True}}}},
    {"prompt": "seven", "response_format": {"type": "grammar", "grammar": 'start: "<" ("a" | "bb") ">"'}},
]


@pytest.fixture(scope="module")
def model(small_checkpoint: Callable[[str], Path]) -> Path:
    return small_checkpoint("llama")


def run(model: Path, requests: Path, output: Path, notes: Notes, **options: Any) -> Any:
    asked: dict[str, Any] = {"sampling": Sampling(max_new_tokens=40), "offload": "cpu", "dtype": "float32", **options}
    asked |= {"model": str(model), "input_files": (str(requests),), "output_file": output}
    outcome = run_job(RunOptions(**asked), World(), torch.device("cpu"), sys.stdout, notes)
    assert outcome is not None
    return outcome


def test_lines_have_formats_of_their_own_and_what_is_cut_is_counted(model: Path, tmp_path: Path) -> None:
    requests, output, notes = write_jsonl(tmp_path / "in.jsonl", LINES), tmp_path / "out.jsonl", Notes()
    outcome = run(model, requests, output, notes)
    found = {(line["id"], line.get("choice")): line for line in read_jsonl(output)}
    jsonschema.validate(json.loads(found["request-1", None]["completion"]), SCHEMA)
    assert found["request-3", None]["completion"] in ("yes", "no")
    assert all(re.fullmatch("[a-c]{2}x", found["request-4", n]["completion"]) for n in range(2))
    assert found["request-5", None]["finish_reason"] == "length"
    assert re.fullmatch("<(a|bb)>", found["request-7", None]["completion"])
    (refused,) = read_jsonl(errors_path(output))
    assert refused["line"] == 6
    assert refused["error"] == "response_format: the JSON schema cannot be carried out: uniqueItems: not supported"
    assert (outcome.report.cut_answers, outcome.report.to_json()["cut_answers"]) == (1, 1)
    assert any(note.startswith("answers cut before they had their format: 1 of 7") for note in notes.notes)


@pytest.mark.full
def test_a_job_goes_on_with_the_same_format_only(model: Path, tmp_path: Path) -> None:
    requests = write_jsonl(tmp_path / "in.jsonl", [{"prompt": f"prompt {n}"} for n in range(5)])
    output, yes = tmp_path / "out.jsonl", ("yes", "no")
    run(model, requests, output, Notes(), choices=yes, batch_size=2)
    whole, lines = output.read_bytes(), journal_path(output).read_bytes().splitlines(keepends=True)
    output.unlink()
    journal_path(output).write_bytes(b"".join(line for line in lines[:4] if b"published" not in line))
    with pytest.raises(zeroinf.errors.OutputError, match="sampling was max_new_tokens"):
        run(model, requests, output, Notes(), choices=("no", "yes"), resume=True)
    run(model, requests, output, Notes(), choices=yes, resume=True)
    assert output.read_bytes() == whole
    assert {line["completion"] for line in read_jsonl(output)} <= {*yes}


@pytest.mark.full
def test_a_batch_of_openai_is_answered_in_the_format_that_its_lines_ask_for(model: Path, tmp_path: Path) -> None:
    body = {"model": "m", "prompt": "hi", "response_format": ASKED, "logit_bias": SPACES, "max_tokens": 40}
    lines = [{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}]
    output = tmp_path / "out.jsonl"
    run(model, write_jsonl(tmp_path / "in.jsonl", lines), output, Notes())
    (choice,) = read_jsonl(output)[0]["response"]["body"]["choices"]
    assert choice["finish_reason"] == "stop"
    jsonschema.validate(json.loads(choice["text"]), SCHEMA)


def asked(model: str, *flags: str) -> Any:
    return CliRunner().invoke(cli, ["run", "-m", model, "--prompt", "a", "-q", "--offload", "cpu", *flags])


def test_only_for_formats_is_the_vocabulary_read_while_a_model_loads(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading = list[Vocabulary]()
    monkeypatch.setattr(Vocabulary, "read_ahead", lambda vocabulary: reading.append(vocabulary))
    for format_of, count in (({}, 0), ({"choices": ["a", "b"]}, 1)):
        zeroinf.generate(str(model), ["a"], max_new_tokens=2, dtype="float32", offload="cpu", **format_of)
        assert len(reading) == count


@pytest.mark.full
def test_flags_give_all_answers_a_format(model: Path) -> None:
    assert asked(str(model), "--choices", '["a, b", "c"]').stdout.splitlines()[1] in ("out=a, b", "out=c")


def test_formats_are_refused_by_their_flags_before_a_model_is_looked_for(tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "array", "contains": {}}')
    for flags, words in {
        ("--json-schema", str(schema)): "--json-schema: the JSON schema cannot be carried out: contains: not supported",
        ("--regex", "a(b"): "--regex: the regex cannot be carried out: unclosed group",
        ("--choices", "a,,b"): "--choices: choices must be texts that are not empty",
        ("--regex", "a", "--choices", "a"): "--regex and --choices contradict each other",
        ("--regex", "a", "--stop", "x"): "stop with response_format",
    }.items():
        found = asked("nobody/nothing", *flags)
        assert isinstance(found.exception, UsageError)
        assert words in found.exception.message


def test_from_python_keywords_and_prompts_have_formats(model: Path) -> None:
    class Reply:
        @classmethod
        def model_json_schema(cls) -> dict[str, Any]:
            return SCHEMA

    bias = {int(token): by for token, by in SPACES.items()}
    how: Any = {"max_prompt_tokens": 8, "max_new_tokens": 40, "dtype": "float32", "offload": "cpu", "batch_size": 2}
    with zeroinf.pipeline(str(model), **how) as pipe:
        own = {"prompt": "a", "response_format": {"type": "text"}}
        first, second, plain = pipe.generate(["a", "b", own], json_schema=Reply, logit_bias=bias)
        for one in (first, second):
            jsonschema.validate(json.loads(one.completion), SCHEMA)
        assert plain.completion == pipe.generate(["a"], logit_bias=bias)[0].completion
        assert pipe("a", choices=["on", "off"], return_full_text=False)[0]["generated_text"] in ("on", "off")
        events = list(pipe.submit("a", regex="[xyz]{5}"))
        assert re.fullmatch("[xyz]{5}", "".join(event.text for event in events))
        for given, words in {
            "regex": ("(", "regex: the regex cannot be carried out"),
            "choices": ("ab", "choices: choices must be a list"),
            "json_schema": ({"not": {}}, "json_schema: the JSON schema cannot"),
            "response_format": ({"type": "x"}, "response_format: must have a type"),
        }.items():
            with pytest.raises(UsageError, match=re.escape(words[1])):
                pipe("a", **{given: words[0]})
        with pytest.raises(UsageError, match="regex and choices contradict"):
            pipe("a", regex="a", choices=["a"])


@pytest.mark.full
def test_the_demo_model_answers_in_json(tmp_path: Path) -> None:
    schema = {**SCHEMA, "properties": {"city": {"type": "string", "maxLength": 30}}, "required": ["city"]}
    (result,) = zeroinf.generate(
        "demo",
        [[{"role": "user", "content": "What is the capital of France? Answer in JSON."}]],
        json_schema=schema,
        max_new_tokens=40,
        offload="cpu",
    )
    assert json.loads(result.completion) == {"city": "Paris"}


def test_answers_without_a_tokenizer_are_refused_by_name(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_bytes((model / "config.json").read_bytes())
    requests = write_jsonl(tmp_path / "in.jsonl", [{"prompt": "a", "response_format": {"type": "json_object"}}])
    with pytest.raises(RequestsFailedError, match="response_format needs the text of tokens"):
        run(folder, requests, tmp_path / "out.jsonl", Notes(), random_weights=True)


def answers(folder: Path, control: Control) -> list[str]:
    """What rank 0 is told of the same requests, however many ranks there are."""
    with serving(folder, control) as service:
        if not control.world.is_main:
            service.wait()
            return []
        asked = [of_choices(["yes", "no", "maybe"]), of_regex("[a-f]{6}"), None, of_regex("x?y{2}")] * 2
        handles = [
            service.submit([5 + n, 9], Sampling(max_new_tokens=12, answer_format=one, temperature=n % 2), index=n)
            for n, one in enumerate(asked)
        ]
        return [handle.result(60).text for handle in handles]


def test_ranks_give_the_answers_of_one(model: Path) -> None:
    ranks, _ = on_ranks(2, lambda control: answers(model, control), seconds=100)
    texts = answers(model, Control(World(), "cpu"))
    assert ranks == [texts, []]
    assert texts[0] in ("yes", "no", "maybe")
    assert re.fullmatch("[a-f]{6}", texts[1])
