"""The stream engine: an unmodified transformers model whose decoder layers are handed their weights as they run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch.nn import Module

from zeroinf.distributed.control import Control
from zeroinf.engines.base import EngineStats
from zeroinf.engines.stream.carrier import Carrier, Partitioned, Replicated
from zeroinf.engines.stream.host import HostMemory
from zeroinf.engines.stream.layout import Layout, lay_out
from zeroinf.engines.stream.load import Target, fill
from zeroinf.engines.stream.ring import Ring
from zeroinf.engines.stream.tensors import Tensor, sort_tensors
from zeroinf.model.inspect import find_blocks
from zeroinf.model.skeleton import build_skeleton
from zeroinf.model.source import ModelSource
from zeroinf.planner.choice import Fetch
from zeroinf.planner.plan import Plan

# On one link: one slot computes, one has arrived, one is on its way. Gathered pieces arrive less evenly: six slots and
# four stages moved 15 % more than three and three on four GPUs (docs/benchmarks.md).
_SLOTS: Mapping[Fetch, int] = {"replicated": 3, "partitioned": 6}


class StreamEngine:
    """Blocks stream from host memory through a ring of device slots; everything else stays on the device.

    Replicated, ranks are independent: each pulls all blocks over its own link. Partitioned, they step together and each
    pulls its part. Either way they read the node's one copy.
    """

    name = "stream"

    def __init__(self, plan: Plan, source: ModelSource, control: Control, device: torch.device) -> None:
        self._forwards = 0
        self.in_step = plan.fetch == "partitioned"
        parts = control.world.size if self.in_step else 1
        self._model = build_skeleton(source, plan.dtype)
        inside, outside = sort_tensors(self._model)
        groups = [*inside, outside]
        layouts = [lay_out((tensor.value for tensor in group), parts) for group in groups]
        starts = [0, *accumulate(layout.nbytes for layout in layouts)]
        self._host = HostMemory(starts[-1], control, pin=plan.pin_memory and device.type == "cuda")
        pieces = [
            self._host.bytes[start : start + layout.nbytes] for start, layout in zip(starts, layouts, strict=False)
        ]
        if control.world.local_rank == 0:
            _fill(groups, layouts, pieces, self._model, source)
        control.gather(None)  # nobody reads before all of it is there
        _bind(_views(outside, layouts[-1], pieces[-1].to(device)))
        self._streamed_bytes = sum(piece.numel() for piece in pieces[:-1])
        carrier: Carrier = Replicated(device)
        if self.in_step:
            largest = max(piece.numel() for piece in pieces[:-1])
            carrier = Partitioned(device, control.world.rank, parts, largest)
        self._ring = Ring(pieces[:-1], _SLOTS[plan.fetch], device, carrier)
        _, blocks = find_blocks(self._model)
        for index, (block, tensors, layout) in enumerate(zip(blocks, inside, layouts, strict=False)):
            self._attach(index, block, [_views(tensors, layout, slot) for slot in self._ring.slots])

    def _attach(self, index: int, block: Module, views: Sequence[_Views]) -> None:
        """Hand `block` the slot's tensors when it is about to run, and the slot back when it has."""

        def take(module: Module, inputs: Any) -> None:
            _bind(views[self._ring.acquire(index)])

        def give_back(module: Module, inputs: Any, output: Any) -> None:
            self._ring.release()

        _bind(views[0])  # nothing stays on the meta device: transformers asks where a model is
        block.register_forward_pre_hook(take)
        block.register_forward_hook(give_back)

    @property
    def model(self) -> Any:
        return self._model

    def forward(self, micro_batches: Sequence[Mapping[str, Any]]) -> list[Any]:
        """One pass over all blocks for each micro-batch."""
        self._forwards += len(micro_batches)
        with torch.inference_mode():
            return [self._model(**inputs) for inputs in micro_batches]

    def stats(self) -> EngineStats:
        return EngineStats(
            forwards=self._forwards,
            streamed_bytes_per_pass=self._streamed_bytes,
            shared_host_bytes=self._host.nbytes,
        )

    def close(self) -> None:
        if self._host.pinned_bytes:
            torch.cuda.synchronize()  # copies still run ahead of a pass that never comes
        self._host.close()


_Views = list[tuple[Tensor, torch.Tensor]]


def _views(tensors: Sequence[Tensor], layout: Layout, piece: torch.Tensor) -> _Views:
    return [(tensor, tensor.like(place.view(piece))) for tensor, place in zip(tensors, layout.places, strict=True)]


def _bind(views: _Views) -> None:
    for tensor, view in views:
        tensor.bind(view)


def _fill(
    groups: Sequence[Sequence[Tensor]],
    layouts: Sequence[Layout],
    pieces: Sequence[torch.Tensor],
    model: Any,
    source: ModelSource,
) -> None:
    """Write everything into host memory: what the checkpoint holds, and the buffers that the model made."""
    targets = []
    for group, layout, piece in zip(groups, layouts, pieces, strict=True):
        for tensor, place in zip(group, layout.places, strict=True):
            memory = place.view(piece)
            if not tensor.is_parameter:
                memory.copy_(tensor.value)
            if tensor.is_parameter or (tensor.stored and not source.random_weights):
                targets.append(Target(tuple(tensor.names), memory))
    fill(targets, model, source)
