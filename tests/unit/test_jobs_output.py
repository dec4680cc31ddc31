"""What the output promises: whole or not there, in input order, and nothing lost in silence."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import shutil
import stat
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zeroinf.errors import EnvironmentProblem, OutputError
from zeroinf.generation.row import FinishReason, Sampling
from zeroinf.jobs import export
from zeroinf.jobs.envelope import chat_logprobs
from zeroinf.jobs.journal_output import JournalOutput
from zeroinf.jobs.output import Job
from zeroinf.jobs.output_files import check_output, errors_path, journal_path, partial_path
from zeroinf.jobs.status import read_status
from zeroinf.jobs.stream_output import LinesOutput, PairsOutput
from zeroinf.jobs.work_list import WorkList
from zeroinf.service.requests import Extra, Refusal, Result, Work


def result(
    index: int, *, completion: str = "out", prompt: str | None = "in", finish_reason: FinishReason = "stop"
) -> Result:
    return Result(
        index=index,
        id=f"id-{index}",
        prompt=prompt,
        completion=completion,
        finish_reason=finish_reason,
        prompt_tokens=3,
        completion_tokens=2,
    )


def refusal(index: int) -> Refusal:
    return Refusal(index=index, line=index + 1, id=None, reason="no")


def work(index: int) -> Work:
    return Work(
        index=index, line=index + 1, id=f"id-{index}", text="in", prompt=(1, 2, 3), sampling=Sampling(max_new_tokens=2)
    )


def job(count: int, *, refused: Sequence[int] = (), **marks: str) -> Job:
    return Job(
        work=WorkList.of(work(index) for index in range(count) if index not in refused),
        refusals=tuple(refusal(index) for index in refused),
        fingerprint={"model": "m", "dtype": "float32", **marks},
    )


def opened(
    out: Path, of: Job, *, overwrite: bool = False, resume: bool = False, resume_anyway: bool = False
) -> JournalOutput:
    return JournalOutput(out, of, overwrite=overwrite, resume=resume or resume_anyway, resume_anyway=resume_anyway)


def begun(out: Path, of: Job, **how: bool) -> JournalOutput:
    output = opened(out, of, **how)
    output.begin(1)
    return output


def ids(path: Path) -> list[str]:
    return [json.loads(line)["id"] for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def left(output: JournalOutput) -> list[int]:
    return [item.index for item in output.left]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


# Lines


def test_a_result_is_one_json_line_with_its_keys_in_order() -> None:
    line = result(0, completion="ü\n\u2028").to_line()
    assert line == (
        '{"id": "id-0", "completion": "ü\\n\u2028", "finish_reason": "stop", '
        '"prompt_tokens": 3, "completion_tokens": 2}'
    )


def test_a_refusal_is_one_json_line() -> None:
    assert refusal(4).to_line() == '{"line": 5, "id": null, "error": "no"}'


# Order and resume


@given(st.data())
def test_any_arrival_order_with_any_stop_between_yields_input_order(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, 10))
    refused = data.draw(st.sets(st.integers(0, count - 1), max_size=count - 1))
    of = job(count, refused=sorted(refused))
    arrival = data.draw(st.permutations([item.index for item in of.work]))
    before = data.draw(st.integers(0, len(arrival)))
    failing = data.draw(st.sets(st.sampled_from(arrival)))
    results = {index: result(index, finish_reason="error" if index in failing else "stop") for index in arrival}
    path = tmp_path_factory.mktemp("any") / "out.jsonl"
    output = begun(path, of)
    for index in arrival[:before]:
        output.add(results[index])
    saved = output.abandon("stopped")
    assert saved == ((journal_path(path), before) if before or refused else (None, 0))
    output = opened(path, of, resume=True)
    assert sorted(left(output)) == sorted(arrival[before:])
    if output.left:
        output.begin(1)
    for index in arrival[before:]:
        output.add(results[index])
    assert [failure.index for failure in output.finish()] == sorted(failing)
    assert ids(path) == [f"id-{item.index}" for item in of.work if item.index not in failing]
    errors = errors_path(path).read_text().splitlines() if errors_path(path).exists() else []
    assert [json.loads(line)["line"] for line in errors] == [index + 1 for index in sorted(refused | failing)]


def test_refusals_are_on_disk_as_soon_as_the_work_begins(out: Path) -> None:
    begun(out, job(3, refused=[1]))
    assert [json.loads(line) for line in errors_path(out).read_text().splitlines()] == [
        {"line": 2, "id": None, "error": "no"}
    ]


def test_an_index_added_twice_is_an_error(out: Path) -> None:
    output = begun(out, job(3))
    output.add(result(0))
    with pytest.raises(ValueError, match="index 0 was added twice"):
        output.add(result(0))


def test_finish_refuses_to_publish_a_gap(out: Path) -> None:
    output = begun(out, job(2))
    output.add(result(1))
    with pytest.raises(ValueError, match="index 0 has no result"):
        output.finish()
    assert not out.exists()
    assert output.abandon("a gap") == (journal_path(out), 1)


def test_a_journal_is_not_gone_on_with_unasked(out: Path) -> None:
    output = begun(out, job(2))
    output.add(result(1))
    output.abandon("stopped")
    with pytest.raises(OutputError, match="holds 1 result of an earlier run") as caught:
        opened(out, job(2))
    assert "--resume" in (caught.value.hint or "")
    assert "--overwrite" in (caught.value.hint or "")


def test_a_job_that_has_changed_is_refused_by_the_name_of_the_field_and_goes_on_only_when_forced(out: Path) -> None:
    output = begun(out, job(3))
    output.add(result(1))
    output.abandon("stopped")
    changed = job(3, dtype="bfloat16")
    with pytest.raises(OutputError, match=r"of another job: dtype was float32, is bfloat16$") as caught:
        opened(out, changed, resume=True)
    assert "--resume-anyway" in (caught.value.hint or "")
    output = begun(out, changed, resume_anyway=True)
    assert (output.changed, left(output)) == (("dtype",), [0, 2])
    output.add(result(0))
    output.abandon("stopped")
    assert '"changed": ["dtype"]' in journal_path(out).read_text(), "it is on record"
    assert left(opened(out, changed, resume=True)) == [2], "what was forced once need not be forced again"


def asks(index: int, prompt: str, request_id: str | None = None) -> Work:
    """Work for `prompt`, with an id of the user's or the one that counts its line."""
    fields = {"index": index, "line": index + 1, "text": prompt, "id": request_id or f"request-{index + 1}"}
    return Work(**{**as_fields(work(index)), **fields})


def of_asked(*prompts: str | tuple[str, str]) -> Job:
    """A job of prompts, or of ids and prompts, with a fingerprint of its own."""
    items = (one if isinstance(one, tuple) else (None, one) for one in prompts)
    asked = tuple(asks(index, prompt, own) for index, (own, prompt) in enumerate(items))
    return Job(work=WorkList.of(asked), refusals=(), fingerprint={"prompts": str(prompts)})


def answer_to(item: Work) -> Result:
    """A result that says which prompt it belongs to."""
    return Result(**{**as_fields(result(item.index, completion=f"to {item.text}")), "id": item.id})


def finish_all(output: JournalOutput) -> list[str]:
    """Run what is left and publish; the prompts that ran."""
    ran = list(output.left)
    if ran:
        output.begin(1)
    for item in ran:
        output.add(answer_to(item))
    output.finish()
    return [item.text or "" for item in ran]


@pytest.mark.parametrize(
    ("before", "now", "runs"),
    [
        (("a", "b"), ("a", "b", "c"), ["c"]),
        (("a", "b", "c"), ("a", "c"), []),
        (("a", "b", "c"), ("c", "b", "a"), []),
        (("a", "b"), ("new", "a", "b"), ["new"]),
        (("a", "b"), ("a", "edited"), ["edited"]),
        (("a", "a", "b"), ("b", "a", "a", "a"), ["a"]),
        ((("x", "a"), ("y", "b")), (("y", "b"), ("x", "a"), ("z", "c")), ["c"]),
        ((("x", "a"), ("y", "b")), (("x", "a"), ("other", "b")), ["b"]),
        ((("x", "a"),), (("x", "edited"),), ["edited"]),
    ],
    ids=["grown", "shrunk", "reordered", "inserted", "edited", "doubled", "by id", "another id", "edited under its id"],
)
@pytest.mark.parametrize("finished", [True, False])
def test_forced_to_go_on_with_a_changed_input_each_request_has_the_result_of_its_own_prompt(
    out: Path, before: tuple[Any, ...], now: tuple[Any, ...], runs: list[str], finished: bool
) -> None:
    first, second = of_asked(*before), of_asked(*now)
    output = begun(out, first)
    for item in first.work:
        output.add(answer_to(item))
    if finished:
        output.finish()
    else:
        output.abandon("stopped")
    with pytest.raises(OutputError, match="of another job"):
        opened(out, second, resume=True)
    assert finish_all(opened(out, second, resume_anyway=True)) == runs
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [(line["id"], line["completion"]) for line in lines] == [(w.id, f"to {w.text}") for w in second.work]
    assert finish_all(opened(out, second, resume=True)) == [], "it is this job from here on"
    now_told = read_status(out)
    assert (now_told.state, now_told.done, now_told.left) == ("finished", len(now), 0)


def test_what_a_forced_run_has_not_kept_does_not_come_back_when_it_is_stopped_as_well(out: Path) -> None:
    output = begun(out, of_asked("a", "b"))
    for item in output.left:
        output.add(answer_to(item))
    output.finish()
    changed = of_asked("new", "edited", "a")
    begun(out, changed, resume_anyway=True).abandon("stopped")
    assert [read_status(out).done, read_status(out).left] == [1, 2]
    assert finish_all(opened(out, changed, resume=True)) == ["new", "edited"]
    assert [json.loads(line)["completion"] for line in out.read_text(encoding="utf-8").splitlines()] == [
        "to new",
        "to edited",
        "to a",
    ]


@pytest.mark.parametrize("now", [("a",), ("a", "b")])
def test_a_finished_output_that_its_user_has_changed_is_found_before_the_work_and_kept(
    out: Path, now: tuple[str, ...]
) -> None:
    finish_all(begun(out, of_asked("a")))
    out.write_text("my notes", encoding="utf-8")
    with pytest.raises(OutputError, match="was changed since the job was finished") as caught:
        opened(out, of_asked(*now), resume_anyway=True)
    assert "move it away" in (caught.value.hint or "")
    assert out.read_text(encoding="utf-8") == "my notes"
    out.rename(out.with_name("notes"))
    assert finish_all(opened(out, of_asked(*now), resume_anyway=True)) == list(now[1:])
    assert len(out.read_text(encoding="utf-8").splitlines()) == len(now)


def as_fields(item: Any) -> dict[str, Any]:
    return {name: getattr(item, name) for name in item.__slots__}


def test_a_journal_without_results_is_no_obstacle(out: Path) -> None:
    begun(out, job(2, refused=[0])).abandon("it does not fit")
    assert journal_path(out).exists(), "the refusals beside it are of this job"
    output = begun(out, job(2, dtype="bfloat16"))
    assert left(output) == [0, 1]
    assert not errors_path(out).exists()


def test_a_run_that_fails_before_it_begins_leaves_what_was_there(out: Path) -> None:
    opened(out, job(1)).abandon("it does not fit")
    assert list(out.parent.iterdir()) == []
    output = begun(out, job(2))
    output.add(result(1))
    output.abandon("stopped")
    before = journal_path(out).read_bytes()
    for how in ("resume", "overwrite"):
        opened(out, job(2), **{how: True}).abandon("it does not fit")
    assert journal_path(out).read_bytes() == before


# Files


def test_finish_leaves_the_output_and_its_journal(out: Path) -> None:
    output = begun(out, job(1))
    output.add(result(0))
    output.finish()
    assert sorted(out.parent.iterdir()) == [out, journal_path(out)]
    assert out.read_bytes() == result(0).to_line().encode() + b"\n"


def test_a_finished_job_is_finished_again_without_work_and_its_output_made_again_where_it_is_gone(out: Path) -> None:
    output = begun(out, job(1))
    output.add(result(0))
    output.finish()
    for step in ("there", "gone"):
        if step == "gone":
            out.unlink()
        output = opened(out, job(1), resume=True)
        assert left(output) == []
        output.finish()
        assert ids(out) == ["id-0"]
        assert not partial_path(out).exists()


def test_finish_syncs_the_file_before_and_its_folder_after_the_rename(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor: int) -> None:
        events.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def record_replace(*names: Any, **options: Any) -> None:
        events.append("rename")
        replace(*names, **options)

    output = begun(out, job(1))
    output.add(result(0))
    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    output.finish()
    assert events == ["file", "file", "rename", "folder", "file"], "journal, output, its name, and that it is there"


def test_half_a_surrogate_pair_is_written_as_its_json_escape(out: Path) -> None:
    output = begun(out, job(1))
    output.add(result(0, completion="a\udc80"))
    output.finish()
    assert json.loads(out.read_bytes())["completion"] == "a\udc80"


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.partial", "out.jsonl.errors.jsonl"])
@pytest.mark.parametrize("resume", [False, True])
def test_nothing_that_has_no_journal_is_lost_without_overwrite(out: Path, name: str, resume: bool) -> None:
    (out.parent / name).write_text("old")
    with pytest.raises(OutputError, match=rf"{name} exists already, without a journal") as caught:
        opened(out, job(1), resume=resume)
    assert "--overwrite" in (caught.value.hint or "")
    assert [path.name for path in out.parent.iterdir()] == [name]
    assert (out.parent / name).read_text() == "old"


def test_a_file_that_is_no_journal_is_left_alone(out: Path) -> None:
    journal_path(out).write_text("what I did on my holidays\n")
    for how in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(OutputError, match="is not a journal of zeroinf"):
            opened(out, job(1), **how)
    assert journal_path(out).read_text() == "what I did on my holidays\n"


def test_overwrite_replaces_what_an_earlier_run_left_and_the_output_only_at_the_end(out: Path) -> None:
    output = begun(out, job(2, refused=[1]))
    output.add(result(0, completion="old"))
    output.finish()
    old = out.read_text(encoding="utf-8")
    output = begun(out, job(1), overwrite=True)
    output.add(result(0))
    assert out.read_text(encoding="utf-8") == old
    output.abandon("stopped")
    output = opened(out, job(1), resume=True)
    output.finish()
    assert sorted(out.parent.iterdir()) == [out, journal_path(out)]
    assert json.loads(out.read_text(encoding="utf-8"))["completion"] == "out"


def test_a_file_that_appears_during_the_run_is_not_replaced(out: Path) -> None:
    output = begun(out, job(1))
    output.add(result(0))
    out.write_text("of another program", encoding="utf-8")
    with pytest.raises(OutputError, match="made by another program") as caught:
        output.finish()
    assert str(partial_path(out)) in (caught.value.hint or "")
    assert (out.read_text(encoding="utf-8"), ids(partial_path(out))) == ("of another program", ["id-0"])


def test_a_second_run_on_the_same_output_is_refused_and_named_and_a_dead_ones_lock_is_none(out: Path) -> None:
    output = begun(out, job(2))
    output.add(result(0))
    with pytest.raises(OutputError, match=rf"another run \(process {os.getpid()} on .*\) is writing"):
        opened(out, job(2), resume=True)
    output.abandon("stopped")
    pid = os.fork()
    if pid == 0:
        opened(out, job(2), resume=True).begin(1)
        os._exit(0)
    os.waitpid(pid, 0)
    assert left(opened(out, job(2), resume=True)) == [1]


def test_a_journal_that_was_removed_under_its_run_is_written_again_and_another_ones_left_alone(out: Path) -> None:
    first = begun(out, job(3))
    first.add(result(0))
    shutil.rmtree(out.parent)
    with pytest.raises(OutputError, match=r"was removed, .*; all results have been written there again") as caught:
        sync(first)
    assert first.abandon(caught.value.message) == (journal_path(out), 1)
    second = begun(out, job(3), resume=True)
    second.add(result(1))
    journal_path(out).unlink()
    other = begun(out, job(2, dtype="bfloat16"))
    other.add(result(0))
    before = journal_path(out).read_bytes()
    with pytest.raises(OutputError, match="it cannot be written again: another file has its name now") as caught:
        sync(second)
    assert second.abandon(caught.value.message) == (None, 0), "and nothing is said to be saved that is not"
    assert journal_path(out).read_bytes() == before


def sync(output: JournalOutput) -> None:
    """What becomes durable after a while, at once."""
    output._journal._sync_due = 0.0
    output.settle()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "is a folder"),
        ("none/out.jsonl", "the folder of .* does not exist"),
        ("file/out.jsonl", "the folder of .* does not exist"),
        ("link", "is not a regular file"),
        ("pipe", "is not a regular file"),
        ("x" * 250, "File name too long"),
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_that_cannot_be_written_is_found_before_the_work(
    tmp_path: Path, name: str, message: str, overwrite: bool
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OutputError, match=message) as caught:
        check_output(tmp_path / name, overwrite=overwrite, resume=False)
    assert caught.value.hint


def test_a_folder_that_is_not_writable_is_found_before_the_work(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(OutputError, match="is not writable"):
        check_output(out, overwrite=False, resume=False)


def test_a_relative_name_without_folder_is_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    output = begun(Path("out.jsonl"), job(0))
    output.finish()
    assert (tmp_path / "out.jsonl").read_bytes() == b""


# Parquet


def test_parquet_holds_the_same_rows_in_the_same_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyarrow import parquet

    monkeypatch.setattr(export, "_PARQUET_ROWS", 2)
    out = tmp_path / "out.parquet"
    output = begun(out, job(5, refused=[3]))
    for index in (4, 0, 2, 1):
        output.add(result(index, completion=f"ü{index}\udc80"))
    output.finish()
    rows = parquet.read_table(out).to_pylist()
    assert [row["id"] for row in rows] == ["id-0", "id-1", "id-2", "id-4"]
    assert rows[0] == {**result(0).to_fields(), "completion": "ü0?", "logprobs": None}
    assert errors_path(out).exists()


def test_parquet_without_pyarrow_is_refused_before_the_work_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(EnvironmentProblem, match=r"out\.parquet needs pyarrow") as caught:
        check_output(tmp_path / "out.parquet", overwrite=False, resume=False)
    assert caught.value.hint == "pip install 'zeroinf[data]'"


# Standard output


def test_pairs_are_printed_in_input_order() -> None:
    stream = io.StringIO()
    output = PairsOutput(stream, WorkList.of([work(0), work(2), work(3)]))
    output.add(result(2, prompt=None, completion="c"))
    output.add(result(0, prompt="a", completion="b"))
    dashes = "-" * 60
    assert stream.getvalue() == f"in=a\nout=b\n{dashes}\nin=id-2\nout=c\n{dashes}\n"
    with pytest.raises(ValueError, match="index 3 has no result"):
        output.finish()
    output.add(result(3))
    output.finish()


def test_long_values_of_a_job_that_has_changed_are_not_told(out: Path) -> None:
    output = begun(out, job(2, prompts="0" * 16))
    output.add(result(0))
    output.abandon("stopped")
    with pytest.raises(OutputError, match=r"of another job: prompts changed$"):
        opened(out, job(2, prompts="1" * 16), resume=True)


def test_abandoned_pairs_are_printed_and_counted() -> None:
    stream = io.StringIO()
    output = PairsOutput(stream, WorkList.of([work(4), work(5)]))
    output.add(result(5))
    assert output.abandon("stopped") == (None, 1)
    assert stream.getvalue().startswith("in=in\nout=out\n")


def test_a_terminal_that_is_not_utf8_shows_an_escape() -> None:
    raw = io.BytesIO()
    output = PairsOutput(io.TextIOWrapper(raw, encoding="latin-1"), WorkList.of([work(0)]))
    output.add(result(0, completion="ü€"))
    assert b"out=\xfc\\u20ac\n" in raw.getvalue()


def test_a_closed_pipe_is_an_output_error() -> None:
    class ClosedPipe(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    output = PairsOutput(ClosedPipe(), WorkList.of([work(0)]))
    with pytest.raises(OutputError, match="Broken pipe; 0 results were printed"):
        output.add(result(0))
    output.add(result(0))
    assert output.abandon("a closed pipe") == (None, 0)


@pytest.mark.parametrize("as_lines", [False, True])
def test_a_pipe_that_closes_between_two_results_is_told_once_and_only_those_before_count(as_lines: bool) -> None:
    class ShortPipe(io.StringIO):
        def write(self, text: str) -> int:
            if self.getvalue():
                raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
            return super().write(text)

    asked = replace(job(4), refusals=())
    output = LinesOutput(ShortPipe(), asked) if as_lines else PairsOutput(ShortPipe(), asked.work)
    output.add(result(0))
    with pytest.raises(OutputError, match="Broken pipe; 1 result was printed"):
        output.add(result(1))
    for index in (1, 2, 3):  # what other ranks still had on its way
        output.add(result(index))
    assert output.abandon("a closed pipe") == (None, 1)


# OpenAI's batches


def batch_job(endpoint: Any = "chat") -> Job:
    """Two entries, the first of which has two completions, and one that is refused."""
    items = [replace(work(index), id=name) for index, name in enumerate(("a", "a", "b"))]
    extras = {
        0: Extra(endpoint=endpoint, choice=0, model="gpt-4o"),
        1: Extra(endpoint=endpoint, choice=1, model="gpt-4o", first=False),
        2: Extra(endpoint=endpoint),
    }
    refused = (Refusal(index=3, line=3, id="c", reason="no"),)
    return Job(work=WorkList.of(items, extras), refusals=refused, fingerprint={}, began=1700000000.5, model="demo")


def test_an_openai_batch_is_answered_as_openai_does(out: Path) -> None:
    output = begun(out, batch_job())
    for index in (2, 1, 0):
        output.add(result(index, completion=f"text {index}"))
    output.finish()
    first, second = (json.loads(line) for line in out.read_text(encoding="utf-8").splitlines())
    assert (first["custom_id"], first["error"], first["response"]["status_code"]) == ("a", None, 200)
    assert first["id"].startswith("batch_req_") and first["response"]["request_id"]
    body = first["response"]["body"]
    assert (body["object"], body["created"], body["model"]) == ("chat.completion", 1700000000, "gpt-4o")
    assert body["choices"] == [
        {
            "index": index,
            "message": {"role": "assistant", "content": f"text {index}", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
        for index in (0, 1)
    ]
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    assert second["response"]["body"]["model"] == "demo"
    (error,) = (json.loads(line) for line in errors_path(out).read_text().splitlines())
    assert (error["custom_id"], error["response"]["status_code"]) == ("c", 400)
    assert error["response"]["body"]["error"]["message"] == "no"


def test_tokens_of_a_chat_have_their_bytes_unless_they_are_parts_of_characters() -> None:
    told = [{"token": "ü", "id": 1, "logprob": -0.5, "top_logprobs": [{"token": "\ufffd", "id": 2, "logprob": -0.1}]}]
    assert chat_logprobs(told) == {
        "content": [
            {
                "token": "ü",
                "logprob": -0.5,
                "bytes": [195, 188],
                "top_logprobs": [{"token": "\ufffd", "logprob": -0.1, "bytes": None}],
            }
        ],
        "refusal": None,
    }


def test_completions_have_texts_and_their_own_logprobs(out: Path) -> None:
    output = begun(out, batch_job("completions"))
    told = [
        {"token": "ab", "id": 1, "logprob": -0.5, "top_logprobs": [{"token": "x", "id": 2, "logprob": -0.1}]},
        {"token": "c", "id": 3, "logprob": -1.0, "top_logprobs": []},
    ]
    for index in range(3):
        output.add(replace(result(index), logprobs=told))
    output.finish()
    body = json.loads(out.read_text(encoding="utf-8").splitlines()[1])["response"]["body"]
    assert body["object"] == "text_completion"
    assert body["choices"] == [
        {
            "index": 0,
            "text": "out",
            "logprobs": {
                "tokens": ["ab", "c"],
                "token_logprobs": [-0.5, -1.0],
                "top_logprobs": [{"x": -0.1}, {}],
                "text_offset": [0, 2],
            },
            "finish_reason": "stop",
        }
    ]


def test_jsonl_of_a_batch_where_it_is_asked_for(out: Path) -> None:
    output = begun(out, replace(batch_job(), output_format="jsonl"))
    for index in range(3):
        output.add(result(index))
    output.finish()
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [(line["id"], line.get("choice")) for line in lines] == [("a", 0), ("a", 1), ("b", None)]


def test_an_echo_stands_before_the_completion(out: Path) -> None:
    output = begun(out, replace(job(1), work=WorkList.of([work(0)], {0: Extra(echo=True)})))
    output.add(result(0))
    output.finish()
    assert json.loads(out.read_text(encoding="utf-8"))["completion"] == "inout"


# Endings


def test_csv_holds_the_same_rows_and_the_columns_of_the_input(tmp_path: Path) -> None:
    extras = {0: Extra(columns={"label": 1, "deep": {"a": [1]}}), 1: Extra(columns={"label": "x,\n", "deep": None})}
    output = begun(tmp_path / "out.csv", replace(job(2), work=WorkList.of([work(0), work(1)], extras)))
    for index in (1, 0):
        output.add(result(index, completion='say "hi",\nü'))
    output.finish()
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["completion"] for row in rows] == ['say "hi",\nü'] * 2
    assert [(row["id"], row["prompt_tokens"], row["label"], row["deep"]) for row in rows] == [
        ("id-0", "3", "1", '{"a": [1]}'),
        ("id-1", "3", "x,\n", ""),
    ]


@pytest.mark.parametrize("name", ["out.txt", "out.json", "out.xlsx"])
def test_an_ending_that_says_nothing_is_refused_before_the_work(name: str, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="does not follow from its ending") as caught:
        check_output(tmp_path / name, overwrite=False, resume=False)
    assert caught.value.hint is not None and "--output-format jsonl|openai|parquet|csv" in caught.value.hint
    check_output(tmp_path / name, overwrite=False, resume=False, output_format="jsonl")


# Standard output


def test_lines_for_programs_are_in_input_order_and_an_entrys_completions_together() -> None:
    stream = io.StringIO()
    output = LinesOutput(stream, batch_job())
    for index in (2, 0):
        output.add(result(index))
        assert stream.getvalue() == ""
    output.add(result(1))
    output.finish()
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["custom_id"] for line in lines] == ["a", "b"]
    assert len(lines[0]["response"]["body"]["choices"]) == 2


def test_lines_stay_json_where_standard_output_is_not_utf8() -> None:
    raw = io.BytesIO()
    output = LinesOutput(io.TextIOWrapper(raw, "ascii", write_through=True), job(1))
    output.add(result(0, completion="ü\U0001f642"))
    assert json.loads(raw.getvalue().decode("ascii"))["completion"] == "ü\U0001f642"


def test_lines_that_wait_are_written_where_a_run_is_given_up() -> None:
    stream = io.StringIO()
    output = LinesOutput(stream, batch_job())
    output.add(result(1))
    output.add(result(2))
    assert output.abandon("stopped").results == 2
    assert [json.loads(line)["custom_id"] for line in stream.getvalue().splitlines()] == ["a", "b"]
