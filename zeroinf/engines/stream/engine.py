"""The stream engine: an unmodified transformers model whose decoder layers are handed their weights as they run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from zeroinf.distributed.control import Control
from zeroinf.engines.base import EngineStats, Listener, Silent, Stalls
from zeroinf.engines.stream.ahead import ReadAhead
from zeroinf.engines.stream.carrier import Carrier, Partitioned, Replicated
from zeroinf.engines.stream.expand import Expander
from zeroinf.engines.stream.lockstep import LockStep
from zeroinf.engines.stream.ring import Piece, Ring
from zeroinf.engines.stream.tensors import Group, Tensor, group_tensors
from zeroinf.engines.stream.weights import Weights
from zeroinf.model.inspect import find_blocks
from zeroinf.model.skeleton import build_skeleton
from zeroinf.model.source import ModelSource
from zeroinf.planner.memory import CHUNK_BYTES, PIECE_ALIGNMENT, SLOTS
from zeroinf.planner.plan import Plan
from zeroinf.planner.tiers import tiers


class StreamEngine:
    """Blocks stream from host memory or from a store through a ring of device slots; the others stay on the device.

    Where weights cross as codes, every block rests as codes, on the device too, and is expanded as its turn comes.
    Replicated, ranks are independent: each pulls all blocks over its own link. Partitioned, they step together and each
    pulls its part. Either way they read the node's one copy.
    """

    name = "stream"
    shares_passes = True

    def __init__(
        self, plan: Plan, source: ModelSource, control: Control, device: torch.device, told: Listener | None = None
    ) -> None:
        self._passes = 0
        self._device = device
        self._model = build_skeleton(source, plan.dtype)
        groups, outside = group_tensors(self._model, plan.wire)
        self._expander = Expander(groups, device) if plan.wire != "model" else None
        where = tiers(len(groups), plan.resident_blocks, plan.nvme_blocks)
        self._weights = Weights(
            plan, (*groups, outside), (*where, "gpu"), self._model, source, control, device, told or Silent()
        )
        self._before: dict[int, Callable[[], None]] = {}
        """What a block needs before its first use in a pass, by its index; most residents need nothing."""
        self.link_stream: Any = None
        self._ring: Ring | None = None
        self._ahead: ReadAhead | None = None
        try:
            streamed = [index for index, tier in enumerate(where) if tier != "gpu"]
            self.in_step = plan.fetch == "partitioned" and bool(streamed)
            in_memory = self._weights.keep([index for index in streamed if where[index] == "host"])
            self._bind_residents([index for index, tier in enumerate(where) if tier == "gpu"], groups, outside)
            pieces = [Piece(groups[index].nbytes, in_memory.get(index)) for index in streamed]
            self._streamed_bytes = sum(piece.nbytes for piece in pieces)
            if pieces:
                self._stream(plan, control, device, pieces, streamed, groups)
            self._lock_step = LockStep(list(find_blocks(self._model)[1]), self._enter, self._leave)
        except BaseException:
            self.close()
            raise

    def _bind_residents(self, blocks: Sequence[int], groups: Sequence[Group], outside: Group) -> None:
        for index, piece in self._weights.place([*blocks, len(groups)]):
            if self._expander is None or index == len(groups):
                _bind(_ready((*groups, outside)[index].views(piece)))
            else:
                _bind(_ready(groups[index].views(self._expander.slot)))
                self._before[index] = partial(self._expander.expand, groups[index], piece)

    def _stream(
        self,
        plan: Plan,
        control: Control,
        device: torch.device,
        pieces: Sequence[Piece],
        streamed: Sequence[int],
        groups: Sequence[Group],
    ) -> None:
        """Start the ring, and let the blocks `streamed` take their tensors from it."""
        carrier: Carrier = Replicated(device)
        if self.in_step:
            unit = PIECE_ALIGNMENT if self._weights.used is None else CHUNK_BYTES
            largest = max(piece.nbytes for piece in pieces)
            carrier = Partitioned(device, control.world.rank, control.world.size, largest, unit)
        self.link_stream = carrier.stream
        on_disk = [index for index, piece in zip(streamed, pieces, strict=True) if piece.memory is None]
        if on_disk:
            assert self._weights.used is not None
            spans = [carrier.span(groups[index].nbytes) for index in on_disk]
            pin = plan.pin_memory and device.type == "cuda"
            self._ahead = ReadAhead(self._weights.used, on_disk, spans, device, pin=pin)
        self._ring = Ring(pieces, SLOTS[plan.fetch], device, carrier, self._ahead)
        for turn, index in enumerate(streamed):
            self._before[index] = self._taking(self._ring, turn, groups[index])

    def _taking(self, ring: Ring, turn: int, group: Group) -> Callable[[], None]:
        """What gives a block the tensors of its `turn`."""
        slots = ring.slots if self._expander is None else [self._expander.slot]
        views = [_ready(group.views(slot)) for slot in slots]
        _bind(views[0])  # nothing stays on the meta device: transformers asks where a model is

        def take() -> None:
            slot = ring.acquire(turn)
            if self._expander is None:
                _bind(views[slot])
            else:
                self._expander.expand(group, ring.slots[slot])

        return take

    def _enter(self, block: int) -> None:
        if block in self._before:
            self._before[block]()

    def _leave(self, block: int) -> None:
        if self._ring is not None and self._ring.is_held:
            self._ring.release()

    @property
    def model(self) -> Any:
        return self._model

    def forward(self, micro_batches: Sequence[Mapping[str, Any]]) -> list[Any]:
        """One pass over all blocks, which serves every micro-batch."""
        self._passes += 1
        with torch.inference_mode():
            return self._lock_step.run([partial(self._model, **inputs) for inputs in micro_batches])

    def recover(self) -> bool:
        if self._ring is not None:
            self._ring.finish(self._passes)
        return True

    def stats(self) -> EngineStats:
        slots = [*(self._ring.slots if self._ring is not None else ())]
        slots += [self._expander.slot] if self._expander is not None else []
        return EngineStats(
            passes=self._passes,
            streamed_bytes_per_pass=self._streamed_bytes,
            shared_host_bytes=self._weights.shared_bytes,
            pinned_host_bytes=self._weights.pinned_bytes + (self._ahead.pinned_bytes if self._ahead is not None else 0),
            slot_bytes=sum(slot.numel() for slot in slots),
            stalls=self._ring.stalls.total() if self._ring is not None else Stalls(),
        )

    def close(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()  # copies still run ahead of a pass that never comes
        if self._ahead is not None:
            self._ahead.close()
        self._weights.close()


_Views = list[tuple[Tensor, torch.Tensor]]


def _ready(views: _Views) -> _Views:
    return [(tensor, tensor.like(view)) for tensor, view in views]


def _bind(views: _Views) -> None:
    for tensor, view in views:
        tensor.bind(view)
