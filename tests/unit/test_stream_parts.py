"""The parts of the stream engine: layouts, the ring of slots, memory that ranks share."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zeroinf.distributed.control import Control
from zeroinf.distributed.world import World
from zeroinf.engines.stream import checkpoint_weights, host_memory, stalls
from zeroinf.engines.stream import ring as ring_module
from zeroinf.engines.stream.host_memory import HostMemory
from zeroinf.engines.stream.layout import lay_out
from zeroinf.engines.stream.ring import Piece, Ring
from zeroinf.engines.stream.transfer import ComputeStream, PartitionedTransfer, ReplicatedTransfer
from zeroinf.engines.stream.weight_source import Pieces
from zeroinf.engines.stream.weights import Weights
from zeroinf.errors import EnvironmentProblem, StoreError
from zeroinf.planner.memory import LOADING_STAGES

DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8)
CPU = torch.device("cpu")


@given(st.lists(st.tuples(st.lists(st.integers(1, 9), max_size=3), st.sampled_from(DTYPES)), min_size=1, max_size=12))
def test_tensors_of_a_layout_are_aligned_and_do_not_touch(specs: list[tuple[list[int], torch.dtype]]) -> None:
    tensors = [(torch.rand(shape) * 2).to(dtype) for shape, dtype in specs]
    layout = lay_out(tensors)
    piece = torch.zeros(layout.nbytes, dtype=torch.uint8)
    for tensor, place in zip(tensors, layout.locations, strict=True):
        assert place.offset % 512 == 0
        place.view(piece).copy_(tensor)
    for tensor, place in zip(tensors, layout.locations, strict=True):
        assert torch.equal(place.view(piece), tensor)


@pytest.mark.parametrize(("pieces", "slots"), [(5, 3), (3, 3), (2, 3), (1, 3), (7, 2)])
def test_each_piece_is_in_its_slot_when_its_turn_comes(pieces: int, slots: int) -> None:
    values = [torch.full((16 + i,), i + 1, dtype=torch.uint8) for i in range(pieces)]
    ring = Ring([Piece(len(value), value) for value in values], slots, CPU, ReplicatedTransfer(CPU), None)
    for turn in range(3 * pieces):
        index = turn % pieces
        slot = ring.acquire(index)
        assert torch.equal(ring.slots[slot][: len(values[index])], values[index])
        ring.release()


class FakeStream:
    """A CUDA stream that notes what it waits for; an event holds the stream on which it was recorded."""

    def __init__(self) -> None:
        self.waited: list[Any] = []
        self.wait_event = self.wait_stream = self.waited.append

    def query(self) -> bool:
        return False


class FakeEvent:
    def record(self, stream: FakeStream) -> None:
        self.stream = stream

    def query(self) -> bool:
        return False


def test_a_pass_under_another_stream_waits_for_its_weights_and_for_the_pass_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second = FakeStream(), FakeStream()
    compute = ComputeStream(CPU)
    compute.is_there, compute._stream = True, first
    for module in (ring_module, stalls):
        monkeypatch.setattr(module, "new_event", lambda device, **kind: FakeEvent())
    ring = Ring([Piece(8, torch.zeros(8, dtype=torch.uint8))] * 2, 2, CPU, ReplicatedTransfer(CPU), None, compute)
    for current in (first, second):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device, current=current: current)
        compute.follow()
        for piece in range(2):
            ring.acquire(piece)
            ring.release()
        assert current.waited[-2:] == ring._arrived
        assert {event.stream for event in ring._released} == {current}
    assert second.waited == [first, *ring._arrived]


def test_the_ring_holds_no_more_slots_than_asked_for() -> None:
    ring = Ring([Piece(100, torch.zeros(100, dtype=torch.uint8))] * 8, 3, CPU, ReplicatedTransfer(CPU), None)
    assert [slot.numel() for slot in ring.slots] == [100, 100, 100]


def test_two_pieces_may_be_held_while_the_next_one_comes() -> None:
    ring = Ring(
        [Piece(1, torch.full((1,), i, dtype=torch.uint8)) for i in range(4)], 3, CPU, ReplicatedTransfer(CPU), None
    )
    for turn in range(9):
        slot = ring.acquire(turn % 4)
        held = [int(each[0]) for each in ring.slots]
        assert held[slot] == turn % 4
        if turn:
            assert (turn - 1) % 4 in held, "the one before is held, too"
            ring.release()
    ring.finish(3)
    assert int(ring.slots[ring.acquire(0)][0]) == 0


def test_a_block_out_of_order_is_an_error_and_never_wrong_weights() -> None:
    ring = Ring([Piece(8, torch.zeros(8, dtype=torch.uint8))] * 3, 2, CPU, ReplicatedTransfer(CPU), None)
    ring.acquire(0)
    ring.release()
    with pytest.raises(RuntimeError, match="block 2 ran out of order: 1 is in the slot"):
        ring.acquire(2)


@given(
    pieces=st.integers(1, 6),
    slots=st.integers(1, 4),
    whole=st.integers(0, 2),
    ran=st.integers(0, 5),
    held=st.booleans(),
)
def test_after_a_broken_pass_the_next_one_begins_with_its_first_piece(
    pieces: int, slots: int, whole: int, ran: int, held: bool
) -> None:
    ring = Ring(
        [Piece(1, torch.full((1,), i, dtype=torch.uint8)) for i in range(pieces)],
        slots,
        CPU,
        ReplicatedTransfer(CPU),
        None,
    )
    ran = min(ran, pieces - 1) if held else min(ran, pieces)
    for turn in range(whole * pieces + ran):
        ring.acquire(turn % pieces)
        ring.release()
    if held:
        ring.acquire(ran)
    ring.finish(whole + 1)
    for index in range(pieces):
        assert ring.slots[ring.acquire(index)].item() == index
        ring.release()


@given(st.integers(1, 10_000), st.integers(1, 8), st.sampled_from([512, 4096]))
def test_parts_of_a_piece_cover_it_once_and_their_gather_fits_its_slot(pages: int, ranks: int, unit: int) -> None:
    nbytes = 512 * pages
    carriers = [PartitionedTransfer(CPU, rank, ranks, nbytes, unit) for rank in range(ranks)]
    spans = [transfer.span(nbytes) for transfer in carriers]
    assert [i for span in spans for i in range(span.start, span.stop, 512)] == list(range(0, nbytes, 512))
    slot = carriers[0].slot_bytes(nbytes)
    assert slot % ranks == 0
    assert all(span.start in (min(rank * slot // ranks, nbytes),) for rank, span in enumerate(spans))
    assert slot < nbytes + ranks * unit


def test_memory_that_cannot_be_locked_is_refused_with_the_limit_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        def cudaHostRegister(self, *args: int) -> int:  # noqa: N802
            return 304

    monkeypatch.setattr(host_memory, "_cudart", Refusing)
    monkeypatch.setattr(host_memory, "read_memlock", lambda: 8 << 20)
    with pytest.raises(EnvironmentProblem, match=r"lock 10\.0 MiB .* the memlock limit is 8\.0 MiB") as caught:
        HostMemory(10 << 20, pin=True)
    assert caught.value.hint == "ulimit -l 10240 or more, or --no-pin-memory"


def test_host_memory_is_exact_and_private_to_a_rank_that_is_alone() -> None:
    memory = HostMemory(12_345, Control(World(), "cpu"), pin=False)
    assert memory.bytes.numel() == memory.nbytes == 12_345
    assert "memfd:zeroinf-weights" not in Path("/proc/self/maps").read_text(encoding="utf-8")


_RANK = """
import torch
from zeroinf.distributed.control import Control
from zeroinf.distributed.world import world_from_environment
from zeroinf.engines.stream import host_memory, stalls
from zeroinf.engines.stream import ring as ring_module
from zeroinf.engines.stream.transfer import ComputeStream, PartitionedTransfer, ReplicatedTransfer
from zeroinf.engines.stream.host_memory import HostMemory

world = world_from_environment()
control = Control(world, "cpu")
memory = HostMemory(1000, control, pin=False)
if world.is_main:
    memory.bytes.fill_(7)
control.all_gather(None)
assert memory.bytes.sum() == 7000, memory.bytes.sum()
assert "memfd:zeroinf-weights (deleted)" in open("/proc/self/maps").read(), "no file system holds it"
control.close()
"""


def test_ranks_of_a_node_map_one_copy() -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _RANK],
            env=os.environ
            | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": "29653",
            },
        )
        for rank in range(2)
    ]
    assert [rank.wait(timeout=60) for rank in ranks] == [0, 0]


class Filler:
    """Fills piece i with the byte i, and says in which order it began; piece `broken` fails."""

    def __init__(self, broken: int | None = None) -> None:
        self.begun: list[int] = []
        self.at_once = threading.Barrier(2)
        self._broken = broken

    def fill(self, pieces: Pieces) -> None:
        ((index, memory),) = pieces
        self.begun.append(index)
        if index < 2:
            self.at_once.wait(60)
        if index == self._broken:
            raise StoreError("broken")
        memory.fill_(index)


def placed(origin: Filler, sizes: list[int]) -> Iterator[tuple[int, torch.Tensor]]:
    """Weights that come from `origin` alone."""
    weights: Any = SimpleNamespace(
        _groups=[SimpleNamespace(nbytes=size) for size in sizes],
        _control=Control(World(), "cpu"), _device=torch.device("cpu"), _pin=False, _weight_source=origin,
    )  # fmt: skip
    return Weights.place(weights, range(len(sizes)))


def test_pieces_for_the_device_are_filled_while_others_are_copied() -> None:
    origin, sizes = Filler(), [4096, 8192, 4096, 12288, 4096, 4096, 20480]
    for index, piece in placed(origin, sizes):
        time.sleep(0.005)  # time to overwrite it, if somebody did
        assert piece.numel() == sizes[index]
        assert piece.min() == piece.max() == index
        assert len(origin.begun) <= index + LOADING_STAGES
    assert sorted(origin.begun) == list(range(len(sizes)))


@pytest.mark.parametrize("broken", [0, 3])
def test_a_piece_that_cannot_be_filled_ends_the_loading(broken: int) -> None:
    with pytest.raises(StoreError, match="broken"):
        for index, _ in placed(Filler(broken), [4096] * 6):
            assert index < broken


def test_parts_of_a_weight_that_transformers_has_loaded_are_read_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, values = torch.arange(4.0), dict[str, torch.Tensor]()
    values |= {"experts": weight, "tied": weight}
    loaded: Any = SimpleNamespace(state_dict=lambda: values)
    monkeypatch.setattr(checkpoint_weights, "load_pretrained", lambda *_: loaded)
    source: Any = SimpleNamespace(location="here")
    read = checkpoint_weights._read_through_transformers(SimpleNamespace(dtype=None), source)
    for entries in (range(2, 4), range(2)):
        assert values
        part: Any = SimpleNamespace(names=("experts", "tied"), entries=entries, of=4)
        assert next(iter(read(part)))[1] is weight
    assert not values  # it is let go of with its last part
