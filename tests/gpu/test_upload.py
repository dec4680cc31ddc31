"""Small values reach the GPU past copies that are under way, and arrive as they were."""

from __future__ import annotations

import pytest
import torch

from zeroinf.engines.stream.gather import copy_to_device
from zeroinf.generation.upload import to_device

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda", 0)


def test_values_pass_what_is_crossing_the_link() -> None:
    weights = torch.empty(1 << 31, dtype=torch.uint8, pin_memory=True)
    slot = torch.empty_like(weights, device=GPU)
    has_crossed = torch.cuda.Event()
    to_device([0], GPU)  # the kernel is loaded
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        slot.copy_(weights, non_blocking=True)
        has_crossed.record()
    moved = to_device([3, 1, 2], GPU)
    torch.cuda.current_stream().synchronize()
    assert not has_crossed.query()
    torch.cuda.synchronize()
    assert moved.tolist() == [3, 1, 2]


def test_values_wait_in_memory_of_their_own_until_they_are_read() -> None:
    torch.cuda._sleep(200_000_000)  # so that nothing is read before all has been written
    moved = [to_device([number, -number], GPU) for number in range(500)]
    fractions = to_device([0.25, 0.1], GPU, torch.float32)
    nothing = to_device([], GPU, torch.int64)
    assert [each.tolist() for each in moved] == [[number, -number] for number in range(500)]
    assert torch.equal(fractions.cpu(), torch.tensor([0.25, 0.1])) and nothing.shape == (0,)


def test_bytes_of_page_locked_memory_arrive_as_they_were_whatever_they_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    pinned = torch.randint(0, 256, (4096,), dtype=torch.uint8, generator=generator).pin_memory()
    target = torch.zeros(4096, dtype=torch.uint8, device=GPU)
    copy_to_device(pinned, target, 1003)
    assert torch.equal(target[:1003].cpu(), pinned[:1003])
    assert not target[1008:].any()
