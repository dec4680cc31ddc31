"""A job that has changed is told from what it was by the name of what changed, whatever that is."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from zeroinf.errors import OutputError
from zeroinf.generation.row import Sampling
from zeroinf.jobs import fingerprint as marks
from zeroinf.jobs.journal_output import JournalOutput
from zeroinf.jobs.output import Job
from zeroinf.model.resolve import resolve_model
from zeroinf.options.options import RunOptions
from zeroinf.planner.plan import TensorParallel
from zeroinf.runs.prepare import read_job
from zeroinf.service.requests import Result

ENTRIES: list[dict[str, Any]] = [{"id": "a", "prompt": "one"}, {"id": "b", "prompt": "two"}, {"id": "bad"}]


TOLD: Any = {"prompt": None, "completion": "x", "finish_reason": "stop", "prompt_tokens": 1, "completion_tokens": 1}


@pytest.fixture
def folder(small_checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """Where a job's model, requests and settings lie, to be changed between two runs."""
    shutil.copytree(small_checkpoint("llama"), tmp_path / "model")
    (tmp_path / "model" / "modeling_odd.py").write_text("ONE = 1\n")
    (tmp_path / "listing.json").write_text("{}")
    (tmp_path / "zero.json").write_text("{}")
    write(tmp_path, ENTRIES)
    return tmp_path


def write(folder: Path, entries: list[dict[str, Any]]) -> None:
    (folder / "in.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def options_in(folder: Path) -> RunOptions:
    return RunOptions(
        model=str(folder / "model"),
        sampling=Sampling(max_new_tokens=4),
        dtype="float32",
        engine="zero",
        trust_remote_code=True,
        input_files=(str(folder / "in.jsonl"),),
        zero_config=folder / "zero.json",
        tensor_parallel=TensorParallel(size=0, checkpoint=folder / "listing.json"),
    )


def job_in(folder: Path, device: str = "cpu", revision: str | None = None, **changed: Any) -> Job:
    options = replace(options_in(folder), **changed)
    source = resolve_model(options.model, trust_remote_code=options.trust_remote_code)
    return read_job(options, replace(source, revision=revision), device).job


def edit_json(file: Path, **fields: Any) -> None:
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    file.write_text(json.dumps({**known, **fields}), encoding="utf-8")


def flip_a_weight(folder: Path) -> None:
    file = folder / "model" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


IN_FILES: dict[str, tuple[Callable[[Path], Any], set[str]]] = {
    "model": (flip_a_weight, {"model"}),
    # The weights' identity covers the config, which says how they are to be read.
    "config": (lambda at: edit_json(at / "model" / "config.json", rms_norm_eps=1e-3), {"config", "model"}),
    "generation config": (
        lambda at: edit_json(at / "model" / "generation_config.json", repetition_penalty=2.0),
        {"generation config"},
    ),
    "template": (lambda at: (at / "model" / "chat_template.jinja").write_text("{{ messages }}"), {"template"}),
    "code of the model": (lambda at: (at / "model" / "modeling_odd.py").write_text("ONE = 2\n"), {"code of the model"}),
    "prompts": (lambda at: write(at, [{**ENTRIES[0], "id": "c"}, *ENTRIES[1:]]), {"prompts"}),
    "tokens": (lambda at: write(at, [{**ENTRIES[0], "prompt": "1"}, *ENTRIES[1:]]), {"tokens", "prompts"}),
    "refused requests": (lambda at: write(at, ENTRIES[:2]), {"refused requests"}),
    "checkpoint listing": (lambda at: (at / "listing.json").write_text("{ }"), {"checkpoint listing"}),
    "ZeRO config": (lambda at: (at / "zero.json").write_text("{ }"), {"ZeRO config"}),
}
ASKED: dict[str, dict[str, Any]] = {
    "revision": {"revision": "v2"},
    "sampling": {"sampling": Sampling(max_new_tokens=4, stop=("x",))},
    "engine": {"engine": "resident", "zero_config": None},
    "dtype": {"dtype": "bfloat16"},
    "wire": {"wire": "int8"},
    "keys and values": {"kv_dtype": "int8"},
    "device": {"device": "cuda"},
    "injection policy": {
        "tensor_parallel": TensorParallel(size=0, checkpoint=Path("listing.json"), injection_policy=(("B", ("c",)),))
    },
}
VERSIONS = ("zeroinf", "torch", "transformers", "deepspeed")


def refused(tmp_path: Path, first: Job, second: Job) -> set[str]:
    """The names in the error that a run of `second` ends with which finds the journal of `first`."""
    out = tmp_path / "out.jsonl"
    output = JournalOutput(out, first, overwrite=False, resume=False, resume_anyway=False)
    output.begin(1)
    output.add(Result(index=0, id="a", **TOLD))
    output.abandon("stopped")
    with pytest.raises(OutputError, match="holds 1 result of another job: ") as caught:
        JournalOutput(out, second, overwrite=False, resume=True, resume_anyway=False)
    assert "--resume-anyway" in (caught.value.hint or "")
    told = caught.value.message.partition("another job: ")[2].split("; ")
    return {part.removesuffix(" changed").partition(" was ")[0] for part in told}


@pytest.mark.parametrize("field", IN_FILES)
def test_what_changed_in_a_file_is_named(field: str, folder: Path, tmp_path: Path) -> None:
    change, named = IN_FILES[field]
    first = job_in(folder)
    change(folder)
    assert refused(tmp_path, first, job_in(folder)) == named
    assert field in named


@pytest.mark.parametrize("field", ASKED)
def test_what_was_asked_for_otherwise_is_named(field: str, folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(folder)
    found = refused(tmp_path, job_in(folder), job_in(folder, **ASKED[field]))
    assert found == ({"engine", "ZeRO config", "deepspeed"} if field == "engine" else {field})


@pytest.mark.parametrize("name", VERSIONS)
def test_another_version_is_named(name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, version = job_in(folder), marks.version
    monkeypatch.setattr(marks, "version", lambda asked: "0.0.1" if asked == name else version(asked))
    if name == "zeroinf":
        monkeypatch.setattr(marks, "__version__", "0.0.1")
    assert refused(tmp_path, first, job_in(folder)) == {name}


def test_sampling_that_all_requests_share_is_told_in_words(folder: Path) -> None:
    told = job_in(folder, **ASKED["sampling"]).fingerprint["sampling"]
    assert told == "max_new_tokens=4, stop=('x',)"
    entries = (ENTRIES[0], {**ENTRIES[1], "max_new_tokens": 2}, *ENTRIES[2:])
    write(folder, entries)
    assert marks.is_digest(job_in(folder, **ASKED["sampling"]).fingerprint["sampling"])


def test_every_field_of_the_fingerprint_is_tried_here(folder: Path) -> None:
    assert set(job_in(folder).fingerprint) == {*IN_FILES, *ASKED, *VERSIONS}


def test_a_job_whose_template_writes_the_date_goes_on_with_the_date_it_began_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "{{ strftime_now('%d %b %Y') }}: {{ messages[0].content }}"
    (folder / "model" / "chat_template.jinja").write_text(template)
    write(folder, [{"messages": [{"role": "user", "content": str(number)}]} for number in range(2)])
    out = folder / "out.jsonl"
    first = job_in(folder, output_file=out)
    output = JournalOutput(out, first, overwrite=False, resume=False, resume_anyway=False)
    output.begin(1)
    output.add(Result(index=0, id=first.work[0].id, **TOLD))
    output.abandon("stopped")
    now = time.time() + 3 * 86400
    monkeypatch.setattr(time, "time", lambda: now)
    assert list(job_in(folder).work) != list(first.work), "another day, another prompt"
    again = job_in(folder, output_file=out, resume=True)
    assert (list(again.work), again.began, again.fingerprint) == (list(first.work), first.began, first.fingerprint)


def test_what_only_moves_work_about_changes_nothing(folder: Path) -> None:
    moved = {"offload": "cpu", "fetch": "replicated", "batch_size": 3, "resident_blocks": 1, "kv": "host"}
    assert job_in(folder, **moved).fingerprint == job_in(folder).fingerprint
