"""What the ordered output promises."""

from __future__ import annotations

import errno
import io
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zeroinf.errors import OutputError
from zeroinf.jobs.output import JsonlOutput, PairsOutput, check_output, errors_path, partial_path
from zeroinf.jobs.requests import Refusal, Result


def result(index: int, *, completion: str = "out", prompt: str | None = "in") -> Result:
    return Result(
        index=index,
        id=f"id-{index}",
        prompt=prompt,
        completion=completion,
        finish_reason="stop",
        prompt_tokens=3,
        completion_tokens=2,
    )


def refusal(index: int) -> Refusal:
    return Refusal(index=index, line=index + 1, id=None, reason="no")


def ids(path: Path) -> list[str]:
    return [json.loads(line)["id"] for line in path.read_text().split("\n")[:-1]]


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


# Order


@given(st.data())
def test_any_arrival_order_yields_input_order(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    refused = data.draw(st.lists(st.booleans(), max_size=12))
    arrival = data.draw(st.permutations(range(len(refused))))
    arrive_before_abandon = data.draw(st.integers(0, len(refused)))
    path = tmp_path_factory.mktemp("any") / "out.jsonl"
    output = JsonlOutput(path, overwrite=False)
    for index in arrival[:arrive_before_abandon]:
        output.add(refusal(index) if refused[index] else result(index))
    kept = sorted(arrival[:arrive_before_abandon])
    if arrive_before_abandon == len(refused):
        output.finish()
        written = path
    else:
        saved = output.abandon()
        assert saved == (partial_path(path), sum(not refused[index] for index in kept))
        written = partial_path(path)
    assert ids(written) == [f"id-{index}" for index in kept if not refused[index]]
    errors = errors_path(path).read_text().splitlines() if errors_path(path).exists() else []
    assert [json.loads(line)["line"] for line in errors] == [index + 1 for index in kept if refused[index]]


def test_a_result_is_on_disk_as_soon_as_all_before_it_are_there(out: Path) -> None:
    output = JsonlOutput(out, overwrite=False)
    output.add(result(0))
    assert ids(partial_path(out)) == ["id-0"]
    output.add(result(3))
    output.add(result(2))
    assert ids(partial_path(out)) == ["id-0"]
    output.add(refusal(1))
    assert ids(partial_path(out)) == ["id-0", "id-2", "id-3"]
    assert not out.exists()


@pytest.mark.parametrize("again", [0, 2])
def test_an_index_added_twice_is_an_error(out: Path, again: int) -> None:
    output = JsonlOutput(out, overwrite=False)
    output.add(result(0))
    output.add(result(2))
    with pytest.raises(ValueError, match=f"index {again} was added twice"):
        output.add(result(again))


def test_finish_refuses_to_publish_a_gap(out: Path) -> None:
    output = JsonlOutput(out, overwrite=False)
    output.add(result(1))
    with pytest.raises(ValueError, match="index 0 is not written"):
        output.finish()
    assert not out.exists()
    assert output.abandon() == (partial_path(out), 1)


# Files


def test_finish_leaves_the_output_alone_in_its_folder(out: Path) -> None:
    output = JsonlOutput(out, overwrite=False)
    output.add(result(0))
    output.finish()
    assert list(out.parent.iterdir()) == [out]
    assert out.read_bytes() == result(0).to_line().encode() + b"\n"


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

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    JsonlOutput(out, overwrite=False).finish()
    assert events.index("file") < events.index("rename")
    assert events[-1] == "folder"


def test_files_have_the_users_umask(out: Path) -> None:
    before = os.umask(0o027)
    try:
        output = JsonlOutput(out, overwrite=False)
        output.add(refusal(0))
        output.finish()
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (out, errors_path(out))} == {0o640}


def test_half_a_surrogate_pair_is_written_as_its_json_escape(out: Path) -> None:
    output = JsonlOutput(out, overwrite=False)
    output.add(result(0, completion="a\udc80"))
    output.finish()
    assert json.loads(out.read_bytes())["completion"] == "a\udc80"


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.partial", "out.jsonl.errors.jsonl"])
def test_nothing_of_an_earlier_run_is_lost_without_overwrite(out: Path, name: str) -> None:
    (out.parent / name).write_text("old")
    for act in (check_output, JsonlOutput):
        with pytest.raises(OutputError, match=rf"{name} exists already") as caught:
            act(out, False)
        assert "--overwrite" in (caught.value.hint or "")
    assert (out.parent / name).read_text() == "old"


def test_overwrite_replaces_what_an_earlier_run_left_and_the_output_only_at_the_end(out: Path) -> None:
    for path in (out, partial_path(out), errors_path(out)):
        path.write_text("old")
    output = JsonlOutput(out, overwrite=True)
    output.add(result(0))
    assert out.read_text() == "old"
    output.finish()
    assert list(out.parent.iterdir()) == [out]
    assert ids(out) == ["id-0"]


def test_a_file_that_appears_during_the_run_is_not_replaced(out: Path) -> None:
    output = JsonlOutput(out, overwrite=False)
    output.add(result(0))
    out.write_text("of another program")
    with pytest.raises(OutputError, match="made by another program") as caught:
        output.finish()
    assert str(partial_path(out)) in (caught.value.hint or "")
    assert (out.read_text(), ids(partial_path(out))) == ("of another program", ["id-0"])


def test_two_runs_do_not_share_a_partial_file(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    JsonlOutput(out, overwrite=False)
    monkeypatch.setattr("zeroinf.jobs.output.check_output", lambda path, overwrite: None)  # both checked beforehand
    with pytest.raises(OutputError, match="File exists"):
        JsonlOutput(out, overwrite=False)


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
        check_output(tmp_path / name, overwrite)
    assert caught.value.hint


def test_a_folder_that_is_not_writable_is_found_before_the_work(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(OutputError, match="is not writable"):
        check_output(out, False)


def test_a_relative_name_without_folder_is_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    output = JsonlOutput(Path("out.jsonl"), overwrite=False)
    output.finish()
    assert (tmp_path / "out.jsonl").read_bytes() == b""


# A disk that is full


class FullDisk(io.FileIO):
    """Takes `room` bytes, then none, as a file system without space does."""

    room = 0

    def write(self, data: Any) -> int:
        taken = bytes(data)[: FullDisk.room]
        if not taken:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        FullDisk.room -= len(taken)
        return super().write(taken)


def test_a_full_disk_ends_in_an_error_that_says_what_is_saved(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line_bytes = len(result(0).to_line()) + 1
    monkeypatch.setattr(FullDisk, "room", 2 * line_bytes + 10)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, mode, buffering: FullDisk(path, mode.replace("b", "")))
        output = JsonlOutput(out, overwrite=False)
    output.add(result(0))
    output.add(result(1))
    output.add(result(3))
    with pytest.raises(OutputError, match=r"No space left on device; 2 results are saved in .*out\.jsonl\.partial"):
        output.add(result(2))
    whole_lines = partial_path(out).read_bytes()
    assert whole_lines.decode() == f"{result(0).to_line()}\n{result(1).to_line()}\n"
    assert output.abandon() == (partial_path(out), 2)
    assert partial_path(out).read_bytes() == whole_lines


def test_when_there_is_room_again_nothing_is_lost_and_no_hole_is_left(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FullDisk, "room", 10)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, mode, buffering: FullDisk(path, mode.replace("b", "")))
        output = JsonlOutput(out, overwrite=False)
    with pytest.raises(OutputError):
        output.add(result(0))
    with pytest.raises(ValueError, match="index 0 is not written"):
        output.finish()
    monkeypatch.setattr(FullDisk, "room", 10_000)
    output.add(result(1))
    output.add(result(3))
    assert output.abandon() == (partial_path(out), 3)
    assert ids(partial_path(out)) == ["id-0", "id-1", "id-3"]


def test_a_failed_sync_is_an_output_error(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    output = JsonlOutput(out, overwrite=False)
    output.add(result(0))
    monkeypatch.setattr(os, "fsync", fail)
    for end in (output.finish, output.abandon):
        with pytest.raises(OutputError, match=r"Input/output error; 1 results are saved"):
            end()
    assert not out.exists()


# Standard output


def test_pairs_are_printed_in_input_order() -> None:
    stream = io.StringIO()
    output = PairsOutput(stream)
    output.add(result(2, prompt=None, completion="c"))
    output.add(refusal(1))
    output.add(result(0, prompt="a", completion="b"))
    output.finish()
    dashes = "-" * 60
    assert stream.getvalue() == f"in=a\nout=b\n{dashes}\nin=id-2\nout=c\n{dashes}\n"


def test_abandoned_pairs_are_printed_and_counted() -> None:
    stream = io.StringIO()
    output = PairsOutput(stream)
    output.add(result(5))
    assert output.abandon() == (None, 1)
    assert stream.getvalue().startswith("in=in\nout=out\n")


def test_a_terminal_that_is_not_utf8_shows_an_escape() -> None:
    raw = io.BytesIO()
    output = PairsOutput(io.TextIOWrapper(raw, encoding="latin-1"))
    output.add(result(0, completion="ü€"))
    assert b"out=\xfc\\u20ac\n" in raw.getvalue()


def test_a_closed_pipe_is_an_output_error() -> None:
    class ClosedPipe(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    output = PairsOutput(ClosedPipe())
    with pytest.raises(OutputError, match="Broken pipe; 0 results were printed"):
        output.add(result(0))
    assert output.abandon() == (None, 0)
