"""The store's format: where bytes lie, what names a store, and what `zeroinf store` says of it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from zeroinf.cli.main import cli
from zeroinf.engines.stream.data_files import DataFiles
from zeroinf.engines.stream.host_memory import HostMemory, view_of
from zeroinf.engines.stream.manage_stores import list_stores
from zeroinf.engines.stream.store import (
    REQUEST_BYTES,
    STRIPE_BYTES,
    StoreContents,
    StoredPiece,
    data_file,
    padded,
    store_folder,
)
from zeroinf.engines.stream.write_store import write_store
from zeroinf.errors import StoreError, UsageError
from zeroinf.model.identity import weights_identity
from zeroinf.model.resolve import resolve_model
from zeroinf.planner.memory import CHUNK_BYTES


def contents_of(sizes: list[int], parts: int) -> StoreContents:
    pieces, end = [], 0
    for nbytes in sizes:
        pieces.append(StoredPiece(offset=end, nbytes=nbytes, tensors=(("w", "torch.uint8", (nbytes,), 0),)))
        end += padded(nbytes)
    named = {
        "model": "m",
        "revision": None,
        "architecture": "A",
        "dtype": "float32",
        "wire": "model",
        "source": "s",
        "made": "",
    }
    return StoreContents(parts=parts, pieces=tuple(pieces), **named)  # type: ignore[arg-type]


SIZES = st.lists(st.integers(1, 10 * STRIPE_BYTES // 4096).map(lambda pages: 4096 * pages), min_size=1, max_size=6)


@given(SIZES, st.integers(1, 4))
def test_every_byte_lies_in_one_place_within_its_part(sizes: list[int], parts: int) -> None:
    contents = contents_of(sizes, parts)
    taken: list[list[tuple[int, int]]] = [[] for _ in range(parts)]
    for index, piece in enumerate(contents.pieces):
        end = 0
        for request in contents.file_ranges(index, 0, piece.nbytes):
            assert request.start == end
            assert 0 < request.nbytes <= REQUEST_BYTES
            assert request.at % 4096 == 0
            end += request.nbytes
            taken[request.part].append((request.at, request.at + request.nbytes))
        assert end == piece.nbytes
    for part, runs in enumerate(taken):
        ordered = sorted(runs)
        assert all(a[1] <= b[0] for a, b in pairwise(ordered))
        assert not ordered or ordered[-1][1] <= contents.part_bytes(part)
    assert sum(map(contents.part_bytes, range(parts))) == contents.data_bytes


class Numbered:
    """An origin that fills each piece with its number."""

    def fill(self, pieces: Any) -> None:
        for index, memory in pieces:
            memory.fill_(index + 1)


@pytest.mark.parametrize("parts", [1, 3])
def test_what_is_written_over_several_paths_is_read_back(parts: int, tmp_path: Path) -> None:
    paths = [tmp_path / str(part) for part in range(parts)]
    for path in paths:
        path.mkdir()
    contents = contents_of([3 * STRIPE_BYTES + 4096, 4096, STRIPE_BYTES], parts)
    store = write_store(contents, paths, Numbered(), direct=False)
    assert [data_file(folder).stat().st_size for folder in store.folders] == [
        contents.part_bytes(p) for p in range(parts)
    ]
    files = DataFiles(store.folders, direct=False)
    for index, piece in enumerate(contents.pieces):
        memory = HostMemory(piece.nbytes, pin=False).bytes
        for request in contents.file_ranges(index, 0, piece.nbytes):
            data = view_of(memory)[request.start : request.start + request.nbytes]
            files.read(request, data)
            store.check(index, request, data)
        assert memory.min() == memory.max() == index + 1
    files.close()


def test_a_name_changes_with_whatever_changes_the_bytes() -> None:
    one = contents_of([4096, 8192], 1)
    others = [
        contents_of([4096, 4096], 1),
        contents_of([4096, 8192], 2),
        replace(one, source="t"),
        replace(one, dtype="bfloat16"),
        replace(one, made="x"),
    ]
    assert len({contents.name for contents in (one, *others)}) == 6
    assert replace(one, model="another name for it").name == one.name


def test_weights_are_told_apart_by_what_they_hold_and_known_again(
    small_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = small_checkpoint("llama")
    copied = shutil.copytree(folder, tmp_path / "copied")
    first = weights_identity(resolve_model(str(folder)))
    assert weights_identity(resolve_model(str(copied))) == first
    times = (copied / "model.safetensors").stat()
    data = bytearray((copied / "model.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (copied / "model.safetensors").write_bytes(data)
    os.utime(copied / "model.safetensors", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert weights_identity(resolve_model(str(copied))) != first
    assert weights_identity(resolve_model(str(folder), random_weights=True)) != first


def test_a_model_of_the_hub_is_known_by_its_commit_before_its_weights_are_there(
    small_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def identity(commit: str) -> str:
        snapshot = tmp_path / "models--who--what" / "snapshots" / commit
        snapshot.mkdir(parents=True)
        shutil.copy(small_checkpoint("llama") / "config.json", snapshot)
        (tmp_path / "models--who--what" / "refs").mkdir(exist_ok=True)
        (tmp_path / "models--who--what" / "refs" / "main").write_text(commit)
        return weights_identity(replace(resolve_model(str(small_checkpoint("llama"))), location="who/what"))

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert identity("1" * 40) != identity("2" * 40)


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """The folder of a whole store below `tmp_path`."""
    return write_store(contents_of([2 * CHUNK_BYTES, 4096], 1), [tmp_path], Numbered(), direct=False).folders[0]


def run(*arguments: str) -> str:
    done = CliRunner().invoke(cli, ["store", *arguments], standalone_mode=False, catch_exceptions=False)
    if done.exception is not None:
        raise done.exception
    return done.stdout


def test_list_shows_each_store_and_what_is_wrong_with_it(whole: Path, tmp_path: Path) -> None:
    shown = run("list", "--nvme-path", str(tmp_path))
    assert whole.name in shown
    assert "whole" in shown
    (entry,) = json.loads(run("list", "--nvme-path", str(tmp_path), "--json"))["stores"]
    assert (entry["name"], entry["state"], entry["model"], entry["dtype"]) == (whole.name, "whole", "m", "float32")
    (whole / "header.json").write_text("{}")
    (entry,) = json.loads(run("list", "--nvme-path", str(tmp_path), "--json"))["stores"]
    assert entry["state"] == "damaged"
    assert "header.json" in entry["detail"]


def test_verify_reads_every_byte_and_names_a_damaged_store(whole: Path, tmp_path: Path) -> None:
    assert "ok, 2.0 MiB" in run("verify", "--nvme-path", str(tmp_path))
    with (whole / "data").open("r+b") as file:
        file.seek(2 * CHUNK_BYTES + 100)
        file.write(b"x")
    with pytest.raises(StoreError, match="1 of 1 stores are damaged") as caught:
        run("verify", "--nvme-path", str(tmp_path))
    assert caught.value.exit_code == 1
    assert f"zeroinf store remove {whole.name}" in (caught.value.hint or "")


def test_remove_asks_unless_told_not_to(whole: Path, tmp_path: Path) -> None:
    CliRunner().invoke(cli, ["store", "remove", whole.name, "--nvme-path", str(tmp_path)], input="n\n")
    assert whole.is_dir()
    run("remove", whole.name, "--nvme-path", str(tmp_path), "--yes")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UsageError, match="no store"):
        run("remove", whole.name, "--nvme-path", str(tmp_path), "--yes")


def test_a_striped_store_wants_all_of_its_paths(tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.mkdir()
    contents = contents_of([2 * STRIPE_BYTES], 2)
    write_store(contents, paths, Numbered(), direct=False)
    both = [argument for path in reversed(paths) for argument in ("--nvme-path", str(path))]
    assert "ok" in run("verify", *both)
    (summary,) = list_stores(paths[1:])
    assert "lies over 2 paths, not 1" in summary.detail
    with pytest.raises(UsageError, match="lies over 2 paths, not 1"):
        run("remove", contents.name, *both[:2], "--yes")
    run("remove", contents.name, *both, "--yes")
    assert not any(store_folder(path, contents.name).exists() for path in paths)
