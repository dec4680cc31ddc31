"""Launches past Triton's binder on a GPU: the same results on any stream, at any address, in a CUDA graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from zeroinf.compat.launches import BoundLaunch, current_of_driver

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def by_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The launches that go through Triton."""
    found: list[Any] = []
    launch = BoundLaunch.__call__

    def noted(self: BoundLaunch, *args: Any) -> None:
        before = len(self._known)
        launch(self, *args)
        found.extend([args] * (len(self._known) - before))

    monkeypatch.setattr(BoundLaunch, "__call__", noted)
    yield found


def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    from zeroinf.engines.stream.norm_kernels import rms_norm

    return rms_norm(x, weight, 1e-6, rounds_first=True, adds_one=False)


def right(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    value = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    return (value.to(x.dtype).float() * weight.float()).to(x.dtype)


@pytest.mark.parametrize("width", [64, 100])
def test_addresses_streams_and_numbers_of_any_kind_give_what_torch_does(width: int, by_triton: list[Any]) -> None:
    assert current_of_driver() is not None
    weight, stream = torch.rand(width, device=CUDA).bfloat16(), torch.cuda.Stream()
    for turn in range(3):
        for rows in (1, 16, 17, 33):
            for start in (0, 1, 8):
                by_triton.clear()
                memory = torch.randn(start + rows * width, device=CUDA).bfloat16()
                x = memory[start:].view(rows, width)
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    found = normed(x, weight)
                torch.cuda.current_stream().wait_stream(stream)
                torch.testing.assert_close(found, right(x, weight), rtol=0.02, atol=1e-3)
                assert not (turn and by_triton)


def test_a_graph_holds_them() -> None:
    x, weight = torch.randn(40, 256, device=CUDA).bfloat16(), torch.rand(256, device=CUDA).bfloat16()
    for _ in range(2):
        normed(x, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = normed(x, weight)
    x.copy_(torch.randn(40, 256, device=CUDA))
    graph.replay()
    torch.testing.assert_close(found, right(x, weight), rtol=0.02, atol=1e-3)
