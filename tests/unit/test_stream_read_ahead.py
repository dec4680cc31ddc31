"""Reading ahead: pieces in order over passes, and no buffer overwritten before its copy is done."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_stream_store import Numbered, contents_of

from zeroinf.engines.stream import read_ahead
from zeroinf.engines.stream.data_files import DataFiles
from zeroinf.engines.stream.read_ahead import ReadAhead
from zeroinf.engines.stream.ring import Piece, Ring
from zeroinf.engines.stream.store import Store
from zeroinf.engines.stream.write_store import write_store
from zeroinf.planner.memory import CHUNK_BYTES

CPU = torch.device("cpu")
SIZES = [6 * CHUNK_BYTES, 4096, 3 * CHUNK_BYTES + 8192, CHUNK_BYTES]
PATIENCE_S = 60


class CopyOnly:
    """A carrier whose ranks are independent or in step, on the CPU."""

    def __init__(self, *, in_step: bool) -> None:
        self.in_step = in_step
        self.carried: list[int] = []

    def span(self, nbytes: int) -> slice:
        return slice(0, nbytes)

    def slot_bytes(self, nbytes: int) -> int:
        return nbytes

    def transfer(self, mine: torch.Tensor, nbytes: int, slot: torch.Tensor, *events: Any) -> None:
        self.carried.append(nbytes)
        slot[:nbytes].copy_(mine)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return write_store(contents_of(SIZES, 1), [tmp_path], Numbered(), direct=False)


@pytest.fixture
def used(store: Store) -> Iterator[Any]:
    files = DataFiles(store.folders, direct=False)
    yield SimpleNamespace(store=store, files=files)
    files.close()


def reading(used: Any, pieces: list[int], spans: list[slice] | None = None) -> ReadAhead:
    return ReadAhead(used, pieces, spans or [slice(0, SIZES[piece]) for piece in pieces], CPU, pin=False)


def test_pieces_come_in_order_pass_after_pass(used: Any) -> None:
    reader = reading(used, [0, 1, 2, 3])
    for turn in range(13):
        piece = turn % 4
        data, _ = reader.take()
        assert data.numel() == SIZES[piece]
        assert data.min() == data.max() == piece + 1
        reader.give_back()
    reader.close()


def test_only_the_span_asked_for_is_read_and_it_may_be_empty(used: Any) -> None:
    reader = reading(used, [0, 1], [slice(2 * CHUNK_BYTES, 4 * CHUNK_BYTES), slice(4096, 4096)])
    for _ in range(3):
        assert [reader.take()[0].numel(), reader.give_back()][0] == 2 * CHUNK_BYTES
        assert [reader.take()[0].numel(), reader.give_back()][0] == 0
    reader.close()


def test_a_buffer_is_not_overwritten_before_its_copy_is_done(used: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Copy:
        """The event of a copy that the GPU has not made yet."""

        def __init__(self) -> None:
            self.recorded, self.done = False, threading.Event()

        def synchronize(self) -> None:
            assert not self.recorded or self.done.wait(PATIENCE_S)

    monkeypatch.setattr(read_ahead, "new_event", lambda device, **kind: Copy())
    reader = reading(used, [0, 3])
    first, copy = reader.take()
    copy.recorded = True
    reader.give_back()
    for _ in range(2):
        reader.take()
        reader.give_back()
    time.sleep(0.2)  # long enough to overwrite it
    assert not reader.is_ready()
    assert first.min() == first.max() == 1
    copy.done.set()
    assert reader.take()[0].max() == 4
    reader.close()


def test_a_waiting_caller_is_told_at_once_when_reading_fails(used: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError("no such luck")

    monkeypatch.setattr(used.files, "read", fail)
    reader = reading(used, [0, 1])
    with pytest.raises(OSError, match="no such luck"):
        reader.take()
    reader.close()


@pytest.mark.parametrize("in_step", [False, True])
@pytest.mark.parametrize("on_disk", [{0}, {1, 3}, {0, 1, 2, 3}, {3}])
def test_pieces_from_memory_and_from_the_store_keep_their_order_in_one_ring(
    on_disk: set[int], in_step: bool, used: Any
) -> None:
    pieces = [
        Piece(size, None if index in on_disk else torch.full((size,), index + 1, dtype=torch.uint8))
        for index, size in enumerate(SIZES)
    ]
    reader = reading(used, sorted(on_disk))
    ring = Ring(pieces, 3, CPU, CopyOnly(in_step=in_step), reader)
    for turn in range(12):
        slot = ring.slots[ring.acquire(turn % 4)][: SIZES[turn % 4]]
        assert slot.min() == slot.max() == turn % 4 + 1
        ring.release()
    reader.close()


def test_ranks_in_step_carry_the_same_pieces_however_fast_their_disks_are(
    used: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def carried(delay_s: float) -> list[list[int]]:
        read = DataFiles.read
        monkeypatch.setattr(DataFiles, "read", lambda *args: (time.sleep(delay_s), read(*args)))
        reader, transfer = reading(used, [1, 3]), CopyOnly(in_step=True)
        pieces = [Piece(size, None if index in (1, 3) else torch.zeros(size)) for index, size in enumerate(SIZES)]
        ring, found = Ring(pieces, 3, CPU, transfer, reader), []
        for turn in range(8):
            ring.acquire(turn % 4)
            if not delay_s:
                time.sleep(0.05)  # for the threads to read all they can
            ring.release()
            found.append(list(transfer.carried))
        reader.close()
        monkeypatch.undo()
        return found

    assert carried(0.0) == carried(0.02)
