"""Stores that are damaged, foreign, unfinished, in use or too large are recognised, named, and make no tokens."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from test_stream_tokens import plain_tokens, stream, tokens_of

from zeroinf.engines.base import SilentListener
from zeroinf.engines.stream import data_files, stored_weights, write_store
from zeroinf.engines.stream.checkpoint_weights import CheckpointWeights
from zeroinf.engines.stream.manage_stores import list_stores, remove_store, verify_store
from zeroinf.engines.stream.store import digest_of, lock_file, of_other_formats, open_store, store_folder
from zeroinf.engines.stream.store_lock import StoreLock
from zeroinf.errors import DoesNotFitError, StoreError
from zeroinf.model.cache import build_once

BLOCKS = 3
PROMPTLY_S = 60


@pytest.fixture
def model(small_checkpoint: Callable[[str], Path]) -> Path:
    return small_checkpoint("llama")


class Notes(SilentListener):
    """A listener that remembers."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


def start(model: Path, nvme: Path, **more: Any) -> Any:
    return stream(model, **{"offload": "nvme", "nvme_blocks": BLOCKS, "nvme_paths": (nvme,), **more})


@pytest.fixture
def written(model: Path, tmp_path: Path) -> Path:
    """The folder of a whole store."""
    start(model, tmp_path).close()
    (summary,) = list_stores([tmp_path])
    assert summary.state == "whole"
    return store_folder(tmp_path, summary.name)


def flip(file: Path, at: int) -> None:
    with file.open("r+b") as opened:
        opened.seek(at)
        byte = opened.read(1)
        opened.seek(at)
        opened.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize("piece", range(BLOCKS + 1))
@pytest.mark.parametrize("tiers", ["nvme", "host", "gpu"])
def test_a_flipped_bit_ends_the_run_before_a_token_of_it_in_every_tier(
    tiers: str, piece: int, written: Path, model: Path, tmp_path: Path
) -> None:
    """Blocks are read from the store into whichever tier they rest in; the last piece is what lies outside of them."""
    where = {"nvme": {}, "host": {"nvme_blocks": 0}, "gpu": {"nvme_blocks": 0, "resident_blocks": BLOCKS}}[tiers]
    store = open_store([tmp_path], written.name)
    assert store is not None
    entry = store.contents.pieces[piece]
    flip(written / "data", entry.offset + entry.nbytes // 2)
    with pytest.raises(StoreError, match=r"is damaged: byte \d+ and on were changed") as caught:
        engine = start(model, tmp_path, **where)  # what stays on the device is read here already
        try:
            tokens_of(engine)
        finally:
            engine.close()
    assert str(written / "data") in caught.value.message
    assert f"zeroinf store remove {written.name}" in (caught.value.hint or "")
    with pytest.raises(StoreError, match="were changed"):
        verify_store(store, lambda nbytes: None)


def truncate(written: Path) -> None:
    os.truncate(written / "data", (written / "data").stat().st_size - 1)


def drop_data(written: Path) -> None:
    (written / "data").unlink()


def flip_header(written: Path) -> None:
    flip(written / "header.json", 200)


def empty_header(written: Path) -> None:
    (written / "header.json").write_text("")


def hand_edit_header(written: Path) -> None:
    header = json.loads((written / "header.json").read_text())
    header["dtype"] = "bfloat16"
    (written / "header.json").write_text(json.dumps(header))


def exchange_for_another(written: Path) -> None:
    """Another model's store under this one's name."""
    from small_models import make_checkpoint

    other = make_checkpoint("gpt_neox", written.parent.parent / "other")
    elsewhere = written.parent.parent / "elsewhere"
    elsewhere.mkdir()
    start(other, elsewhere).close()
    (summary,) = list_stores([elsewhere])
    shutil.rmtree(written)
    shutil.copytree(store_folder(elsewhere, summary.name), written)


def test_nobody_but_their_owner_may_write_to_stores_whatever_the_umask(model: Path, tmp_path: Path) -> None:
    seen: dict[str, int] = {}
    rename = Path.rename

    def noted(self: Path, target: Path) -> Path:
        seen.update({path.name: path.stat().st_mode for path in (tmp_path / "zeroinf-store").rglob("*")})
        return rename(self, target)

    before = os.umask(0)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "rename", noted)
            start(model, tmp_path).close()
    finally:
        os.umask(before)
    seen |= {path.name: path.stat().st_mode for path in tmp_path.rglob("*")}
    assert seen.keys() >= {"zeroinf-store", "data", "journal", "header.partial", "header.json"}
    assert [name for name, mode in seen.items() if mode & (stat.S_IWGRP | stat.S_IWOTH)] == []


ALICE, BOB = 54321, 54322  # users without a name, and without a right beyond those of everybody


def as_user(uid: int, body: Callable[[], Any]) -> str:
    """What `body` returns, or the words of the error that it raises, in a process of this user's."""
    reads, writes = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            answer = str(body())
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}; {getattr(error, 'hint', '')}"
        os.write(writes, answer.encode())
        os._exit(0)
    os.close(writes)
    with os.fdopen(reads) as pipe:
        answer = pipe.read()
    os.waitpid(pid, 0)
    return answer


@pytest.fixture
def for_all(model: Path) -> Iterator[Path]:
    """A folder in which every user may make files, as on a disk that several share; `model` and `other` in it."""
    if os.geteuid() != 0:
        pytest.skip("only root can be several users")
    folder = Path(tempfile.mkdtemp(prefix="zeroinf-users-"))
    shutil.copytree(model, folder / "model")
    shutil.copytree(model, folder / "other")
    flip(folder / "other" / "model.safetensors", (folder / "other" / "model.safetensors").stat().st_size - 1)
    for file in folder.rglob("*"):
        file.chmod(0o755)
    folder.chmod(0o1777)
    before = os.umask(0o022)
    yield folder
    os.umask(before)
    shutil.rmtree(folder)


def begin(model: str, folder: Path, umask: int = 0o022) -> list[str]:
    """Start a run, and end it; what was told."""
    os.umask(umask)
    notes = Notes()
    start(folder / model, folder, told=notes).close()
    return [text.partition(" ")[0] for text in notes.texts]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_users_of_one_path_have_their_stores_beside_each_other(umask: int, for_all: Path) -> None:
    assert as_user(ALICE, lambda: begin("model", for_all, umask)) == "['writing']"
    assert as_user(BOB, lambda: begin("other", for_all, umask)) == "['writing']"
    assert as_user(ALICE, lambda: begin("model", for_all, umask)) == "[]"
    assert {file.stat().st_uid for file in (for_all / "zeroinf-store").iterdir()} == {ALICE, BOB}
    assert stat.S_IMODE((for_all / "zeroinf-store").stat().st_mode) == 0o1777


def test_a_store_that_another_user_wrote_is_read_where_the_umask_lets_it_and_is_theirs_to_remove(for_all: Path) -> None:
    as_user(ALICE, lambda: begin("model", for_all))
    (summary,) = list_stores([for_all])
    assert as_user(BOB, lambda: begin("model", for_all)) == "[]"
    removed = as_user(BOB, lambda: remove_store([for_all], summary.name))
    assert f"belongs to user {ALICE}, and you may not remove it" in removed
    assert as_user(ALICE, lambda: remove_store([for_all], summary.name)) == str(summary.disk_bytes)
    assert as_user(BOB, lambda: begin("model", for_all)) == "['writing']"


def test_a_store_that_another_user_keeps_to_themselves_or_has_not_finished_is_refused_by_name(for_all: Path) -> None:
    as_user(ALICE, lambda: begin("model", for_all, 0o077))
    (summary,) = list_stores([for_all])
    refused = as_user(BOB, lambda: begin("model", for_all))
    folder = store_folder(for_all, summary.name)
    assert refused.startswith(f"ForbiddenStoreError: the store {folder} belongs to user {ALICE}, and you may not read")
    assert "choose another --nvme-path" in refused
    assert as_user(BOB, lambda: [found.state for found in list_stores([for_all])]) == "['forbidden']"
    folder.chmod(0o755)
    (folder / "header.json").unlink()
    assert "you may not finish it" in as_user(BOB, lambda: begin("model", for_all))


def test_a_folder_of_stores_that_is_its_owners_alone_is_named_with_what_would_share_it(for_all: Path) -> None:
    as_user(ALICE, lambda: begin("model", for_all))
    (for_all / "zeroinf-store").chmod(0o755)
    refused = as_user(BOB, lambda: begin("other", for_all))
    assert f"{for_all}/zeroinf-store belongs to user {ALICE}, and you may not write it" in refused
    assert f"chmod a+rwxt {for_all}/zeroinf-store" in refused
    assert as_user(BOB, lambda: begin("model", for_all)) == "[]"


def test_users_of_one_cache_convert_beside_each_other(for_all: Path) -> None:
    def convert(name: str) -> Path:
        return build_once(for_all / "cache" / "gguf" / name, lambda partial: (partial / "weights").touch())

    for uid, name in ((ALICE, "a"), (BOB, "b"), (BOB, "a")):
        assert as_user(uid, lambda name=name: convert(name)) == str(for_all / "cache" / "gguf" / name)
    (for_all / "cache" / "gguf").chmod(0o755)
    assert "EnvironmentProblem: cannot write to the cache" in as_user(BOB, lambda: convert("c"))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, "bytes instead of"),
        (drop_data, "No such file"),
        (flip_header, "damaged"),
        (empty_header, "cannot be read"),
        (hand_edit_header, "changed after it was written"),
        (exchange_for_another, "it belongs to another store"),
    ],
)
def test_a_damaged_or_foreign_store_is_refused_when_a_run_starts(
    damage: Callable[[Path], None], words: str, written: Path, model: Path, tmp_path: Path
) -> None:
    damage(written)
    with pytest.raises(StoreError, match=words) as caught:
        start(model, tmp_path)
    assert str(written) in caught.value.message
    assert [summary.state for summary in list_stores([tmp_path])] == ["damaged"]
    remove_store([tmp_path], written.name)
    engine = start(model, tmp_path)
    assert tokens_of(engine) == plain_tokens(model)
    engine.close()


def test_an_interrupted_write_goes_on_where_it_stopped(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled: list[int] = []
    fill, flush, flushes = CheckpointWeights.fill, data_files.DataFiles.flush, iter(range(100))

    def counting(self: CheckpointWeights, pieces: Any) -> None:
        filled.extend(index for index, _ in pieces)
        fill(self, pieces)

    def interrupted(self: data_files.DataFiles) -> None:
        if next(flushes) == 2:
            raise KeyboardInterrupt
        flush(self)

    monkeypatch.setattr(CheckpointWeights, "fill", counting)
    monkeypatch.setattr(data_files.DataFiles, "flush", interrupted)
    with pytest.raises(KeyboardInterrupt):
        start(model, tmp_path)
    (summary,) = list_stores([tmp_path])
    assert summary.state == "unfinished"
    journal = store_folder(tmp_path, summary.name) / "journal"
    assert len(journal.read_text().splitlines()) == 2
    with journal.open("a") as file:
        file.write('[2, ["0a')  # the power went while this line was written
    monkeypatch.undo()
    monkeypatch.setattr(CheckpointWeights, "fill", counting)
    filled.clear()
    engine = start(model, tmp_path)
    assert filled == [2, 3]
    assert tokens_of(engine) == plain_tokens(model)
    engine.close()
    assert not journal.exists()


def test_a_second_start_neither_writes_nor_loads_the_checkpoint(
    written: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_loading(*args: object) -> None:
        raise AssertionError("the checkpoint is being loaded")

    before = {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in written.iterdir()}
    monkeypatch.setattr(CheckpointWeights, "__init__", no_loading)
    engine = start(model, tmp_path)
    assert tokens_of(engine) == plain_tokens(model)
    engine.close()
    assert {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in written.iterdir()} == before


def test_a_checkpoint_that_changed_gets_a_store_of_its_own(written: Path, model: Path, tmp_path: Path) -> None:
    changed = shutil.copytree(model, tmp_path / "changed")
    flip(changed / "model.safetensors", (changed / "model.safetensors").stat().st_size - 1)
    engine = start(changed, tmp_path)
    engine.close()
    assert len(list_stores([tmp_path])) == 2


@contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_is_full_ends_the_write_with_figures_and_leaves_nothing(model: Path, tmp_path: Path) -> None:
    with largest_file(1 << 20), pytest.raises(DoesNotFitError, match=r"the store takes 4\.0 MiB below each"):
        start(model, tmp_path)
    assert list_stores([tmp_path]) == []


def test_a_disk_that_fills_up_midway_keeps_what_is_done_for_the_next_run(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes = iter(range(100))
    pwritev = os.pwritev

    def full(*args: Any) -> int:
        if next(writes) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwritev(*args)

    monkeypatch.setattr(data_files.os, "pwritev", full)
    with pytest.raises(DoesNotFitError):
        start(model, tmp_path)
    monkeypatch.undo()
    assert [summary.state for summary in list_stores([tmp_path])] == ["unfinished"]
    engine = start(model, tmp_path)
    assert tokens_of(engine) == plain_tokens(model)
    engine.close()


def test_a_disk_too_small_is_refused_before_anything_is_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=3 << 20)
    monkeypatch.setattr(write_store.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DoesNotFitError, match=r"has 3\.0 MiB free"):
        start(model, tmp_path)
    assert not any((folder / "data").exists() for folder in (tmp_path / "zeroinf-store").iterdir())


def test_a_second_writer_waits_says_so_and_uses_what_the_first_wrote(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    start(model, elsewhere).close()
    (summary,) = list_stores([elsewhere])
    here = store_folder(tmp_path, summary.name)
    first = StoreLock([lock_file(tmp_path, summary.name)])
    here.parent.mkdir()
    assert first.try_to_take()
    notes, engines = Notes(), []
    second = threading.Thread(target=lambda: engines.append(start(model, tmp_path, told=notes)))
    second.start()
    deadline = time.monotonic() + PROMPTLY_S
    while not notes.texts and time.monotonic() < deadline:
        time.sleep(0.01)
    assert notes.texts == [f"another process writes the store {summary.name}: waiting for its end"]
    assert not engines
    shutil.copytree(store_folder(elsewhere, summary.name), here)  # the first one is done
    monkeypatch.setattr(CheckpointWeights, "__init__", lambda *args: pytest.fail("written twice"))
    first.release()
    second.join(PROMPTLY_S)
    assert tokens_of(engines[0]) == plain_tokens(model)
    engines[0].close()


def test_a_store_of_an_earlier_format_is_not_used_and_may_go(written: Path, model: Path, tmp_path: Path) -> None:
    header = json.loads((written / "header.json").read_text())
    body = {**header, "format": header["format"] - 1}
    del body["digest"]
    digest = digest_of(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())
    (written / "header.json").write_text(json.dumps({"digest": digest, **body}))
    old = written.rename(written.with_name("0" * 12 + "-" + "0" * 12)).name  # each format has names of its own
    assert of_other_formats(tmp_path) == [old]
    notes = Notes()
    engine = start(model, tmp_path, told=notes)
    assert tokens_of(engine) == plain_tokens(model)
    engine.close()
    assert any(f"zeroinf store remove {old} --nvme-path {tmp_path}" in text for text in notes.texts)
    assert {summary.name: summary.state for summary in list_stores([tmp_path])} == {
        old: "unused",
        written.name: "whole",
    }
    remove_store([tmp_path], old)
    assert open_store([tmp_path], written.name) is not None


def test_the_lock_of_a_process_that_died_stops_nobody(model: Path, tmp_path: Path) -> None:
    start(model, tmp_path).close()
    (summary,) = list_stores([tmp_path])
    pid = os.fork()
    if pid == 0:
        StoreLock([lock_file(tmp_path, summary.name)]).try_to_take()
        os._exit(0)
    os.waitpid(pid, 0)
    notes = Notes()
    start(model, tmp_path, told=notes).close()
    assert notes.texts == []


def test_a_store_in_use_is_not_removed(model: Path, tmp_path: Path) -> None:
    engine = start(model, tmp_path)
    (summary,) = list_stores([tmp_path])
    with pytest.raises(StoreError, match="is in use"):
        remove_store([tmp_path], summary.name)
    engine.close()
    assert remove_store([tmp_path], summary.name) == summary.disk_bytes
    assert list(tmp_path.iterdir()) == []


def fails_promptly(engine: Any) -> StoreError:
    started = time.monotonic()
    with pytest.raises(StoreError) as caught:
        tokens_of(engine)
    assert time.monotonic() - started < PROMPTLY_S
    engine.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "read-ahead"]
    return caught.value


def test_a_file_that_is_cut_off_under_a_run_ends_it_and_is_named(model: Path, tmp_path: Path) -> None:
    engine = start(model, tmp_path)
    (summary,) = list_stores([tmp_path])
    data = store_folder(tmp_path, summary.name) / "data"
    os.truncate(data, 0)
    error = fails_promptly(engine)
    assert f"{data} is damaged: it ends at byte" in error.message


def test_a_disk_that_fails_under_a_run_ends_it_and_is_named(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start(model, tmp_path)

    def fail(*args: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(data_files.os, "preadv", fail)
    error = fails_promptly(engine)
    assert "Input/output error" in error.message
    assert str(tmp_path) in error.message


def test_a_file_that_is_unlinked_under_a_run_serves_it_to_its_end(model: Path, tmp_path: Path) -> None:
    engine = start(model, tmp_path)
    shutil.rmtree(tmp_path / "zeroinf-store")
    assert tokens_of(engine) == plain_tokens(model)
    engine.close()


def test_without_o_direct_it_works_through_the_page_cache_and_says_so(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags: list[int] = []
    opened = os.open

    def without(path: Any, how: int, *more: Any, **named: Any) -> int:
        flags.append(how)
        if how & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return opened(path, how, *more, **named)

    monkeypatch.setattr(os, "open", without)
    notes = Notes()
    engine = start(model, tmp_path, told=notes)
    assert any("no O_DIRECT below" in text for text in notes.texts)
    assert tokens_of(engine) == plain_tokens(model)
    engine.close()


def test_closing_ends_the_readers_at_once(model: Path, tmp_path: Path) -> None:
    engine = start(model, tmp_path)
    assert [thread for thread in threading.enumerate() if thread.name == "read-ahead"]
    engine.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "read-ahead"]


def test_an_engine_that_cannot_be_built_lets_go_of_the_store(
    written: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_weights.StoredWeights, "fill", lambda self, pieces: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        start(model, tmp_path)
    remove_store([tmp_path], written.name)
