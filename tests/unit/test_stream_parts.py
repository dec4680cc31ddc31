"""The parts of the stream engine: layouts, the ring of slots, memory that ranks share, and the choice of engine."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zeroinf.distributed.control import Control
from zeroinf.distributed.world import World
from zeroinf.engines.stream.carrier import Replicated
from zeroinf.engines.stream.host import HostMemory
from zeroinf.engines.stream.layout import lay_out
from zeroinf.engines.stream.ring import Ring
from zeroinf.errors import UsageError
from zeroinf.jobs.prepare import choose_engine

DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8)
CPU = torch.device("cpu")


@given(st.lists(st.tuples(st.lists(st.integers(1, 9), max_size=3), st.sampled_from(DTYPES)), min_size=1, max_size=12))
def test_tensors_of_a_layout_are_aligned_and_do_not_touch(specs: list[tuple[list[int], torch.dtype]]) -> None:
    tensors = [(torch.rand(shape) * 2).to(dtype) for shape, dtype in specs]
    layout = lay_out(tensors)
    piece = torch.zeros(layout.nbytes, dtype=torch.uint8)
    for tensor, place in zip(tensors, layout.places, strict=True):
        assert place.offset % 512 == 0
        place.view(piece).copy_(tensor)
    for tensor, place in zip(tensors, layout.places, strict=True):
        assert torch.equal(place.view(piece), tensor)


@pytest.mark.parametrize(("pieces", "slots"), [(5, 3), (3, 3), (2, 3), (1, 3), (7, 2)])
def test_each_piece_is_in_its_slot_when_its_turn_comes(pieces: int, slots: int) -> None:
    values = [torch.full((16 + i,), i + 1, dtype=torch.uint8) for i in range(pieces)]
    ring = Ring(values, slots, CPU, Replicated(CPU))
    for turn in range(3 * pieces):
        index = turn % pieces
        slot = ring.acquire(index)
        assert torch.equal(ring.slots[slot][: len(values[index])], values[index])
        ring.release()


def test_the_ring_holds_no_more_slots_than_asked_for() -> None:
    ring = Ring([torch.zeros(100, dtype=torch.uint8)] * 8, 3, CPU, Replicated(CPU))
    assert [slot.numel() for slot in ring.slots] == [100, 100, 100]


def test_a_block_out_of_order_is_an_error_and_never_wrong_weights() -> None:
    ring = Ring([torch.zeros(8, dtype=torch.uint8)] * 3, 2, CPU, Replicated(CPU))
    ring.acquire(0)
    ring.release()
    with pytest.raises(RuntimeError, match="block 2 ran out of order: 1 is in the slot"):
        ring.acquire(2)


def test_host_memory_is_exact_and_has_no_name_in_a_file_system() -> None:
    memory = HostMemory(12_345, Control(World(), "cpu"), pin=False)
    assert memory.bytes.numel() == memory.nbytes == 12_345
    maps = open("/proc/self/maps").read()  # noqa: SIM115, PTH123
    assert any("memfd:zeroinf-weights (deleted)" in line for line in maps.splitlines())


_RANK = """
import torch
from zeroinf.distributed.control import Control
from zeroinf.distributed.world import world_from_environment
from zeroinf.engines.stream.carrier import Replicated
from zeroinf.engines.stream.host import HostMemory

world = world_from_environment()
control = Control(world, "cpu")
memory = HostMemory(1000, control, pin=False)
if world.is_main:
    memory.bytes.fill_(7)
control.gather(None)
assert memory.bytes.sum() == 7000, memory.bytes.sum()
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


@pytest.mark.parametrize(
    ("asked", "offload", "own_config", "engine", "why"),
    [
        ("auto", "cpu", False, "stream", None),
        (
            "auto",
            "nvme",
            False,
            "zero",
            "--offload nvme is DeepSpeed's: the stream engine keeps weights in host memory",
        ),
        (
            "auto",
            "none",
            False,
            "zero",
            "--offload none is DeepSpeed's: the stream engine keeps weights in host memory",
        ),
        ("auto", "cpu", True, "zero", "--zero-config configures DeepSpeed"),
        ("zero", "cpu", False, "zero", None),
        ("stream", "cpu", False, "stream", None),
    ],
)
def test_auto_takes_the_stream_engine_unless_it_says_why(
    asked: str, offload: str, own_config: bool, engine: str, why: str | None
) -> None:
    assert choose_engine(asked, offload, own_zero_config=own_config) == (engine, why)  # type: ignore[arg-type]


@pytest.mark.parametrize(("offload", "own_config"), [("nvme", False), ("none", False), ("cpu", True)])
def test_the_stream_engine_is_refused_by_name_for_what_it_does_not_do(offload: str, own_config: bool) -> None:
    with pytest.raises(UsageError, match="--engine stream"):
        choose_engine("stream", offload, own_zero_config=own_config)  # type: ignore[arg-type]
