"""Loads every piece of a model once, from its checkpoint or store, to the tier that the plan assigns to it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate
from typing import Any

import torch

from zeroinf.distributed.control import Control
from zeroinf.engines.base import LoadListener
from zeroinf.engines.stream.checkpoint_weights import CheckpointWeights
from zeroinf.engines.stream.host_memory import HostMemory
from zeroinf.engines.stream.store import in_order
from zeroinf.engines.stream.stored_weights import StoredWeights, StoreInUse, describe
from zeroinf.engines.stream.tensor_groups import TensorGroup
from zeroinf.engines.stream.weight_source import LoadProgress, WeightSource
from zeroinf.model.source import ModelSource
from zeroinf.planner.memory import LOADING_STAGES
from zeroinf.planner.plan import Plan
from zeroinf.planner.tiers import Tier


class Weights:
    """The pieces of a model's groups, from its checkpoint or, with NVMe offload, from the store written from it.

    What rests in host memory lies there once a node, whatever the number of ranks. What stays on the device passes
    through stages that the ranks of a node fill together: of it the host keeps nothing.
    """

    def __init__(
        self,
        plan: Plan,
        groups: Sequence[TensorGroup],
        where: Sequence[Tier],
        model: Any,
        source: ModelSource,
        control: Control,
        device: torch.device,
        listener: LoadListener,
    ) -> None:
        self._groups, self._control, self._device = groups, control, device
        self._pin = plan.pin_memory and device.type == "cuda"
        self._host: HostMemory | None = None
        self.used: StoreInUse | None = None
        tables = [table.tensor for table in plan.anatomy.tables] if plan.embeddings != "gpu" else []
        loaded = sum(group.nbytes for group, tier in zip(groups, where, strict=True) if tier != "nvme")

        if plan.offload == "nvme":
            contents = describe(groups, plan, source)
            written = LoadProgress(sum(group.nbytes for group in groups), listener.filled)
            self.used = StoreInUse(
                contents,
                in_order(plan.nvme_paths),
                control,
                lambda: CheckpointWeights(groups, model, source, None, device, written, tables),
                listener,
            )
            self._weight_source: WeightSource = StoredWeights(self.used, control, LoadProgress(loaded, listener.filled))
        else:
            self._weight_source = CheckpointWeights(
                groups, model, source, control, device, LoadProgress(loaded, listener.filled), tables
            )

    def keep(self, groups: Sequence[int]) -> Mapping[int, torch.Tensor]:
        """Load pieces into host memory (uint8), where they stay until `close`."""
        if not groups:
            return {}
        starts = [0, *accumulate(self._groups[index].nbytes for index in groups)]
        self._host = HostMemory(starts[-1], self._control, pin=False)
        pieces = {
            index: self._host.bytes[start : start + self._groups[index].nbytes]
            for index, start in zip(groups, starts, strict=False)
        }
        self._weight_source.fill(list(pieces.items()))
        self._control.all_gather(None)  # nobody reads before all of it is there
        if self._pin:
            self._host.pin()  # only now: untouched pages would be made by this one thread, not by those that fill them
        return pieces

    def place(self, groups: Sequence[int]) -> Iterator[tuple[int, torch.Tensor]]:
        """Load pieces onto the device (uint8), each into memory of its own, in order.

        While one is copied the next ones are filled, each in a stage of its own, so that a disk always has work.
        """
        sizes = [self._groups[index].nbytes for index in groups]
        # All at once: what codes are made with would leave gaps between them.
        pieces = [torch.empty(size, dtype=torch.uint8, device=self._device) for size in sizes]
        stages = [
            HostMemory(max(sizes[turn::LOADING_STAGES]), self._control, pin=False)
            for turn in range(min(LOADING_STAGES, len(sizes)))
        ]
        filling: deque[Future[None]] = deque()
        with ThreadPoolExecutor(LOADING_STAGES - 1) as pool:

            def begin(turn: int) -> None:
                if turn < len(groups):
                    memory = stages[turn % LOADING_STAGES].bytes[: sizes[turn]]
                    filling.append(pool.submit(self._weight_source.fill, [(groups[turn], memory)]))

            try:
                for turn in range(LOADING_STAGES - 1):
                    begin(turn)
                for turn, index in enumerate(groups):
                    filling.popleft().result()
                    self._control.all_gather(None)  # all ranks have filled this stage, and copied the piece before
                    begin(turn + LOADING_STAGES - 1)
                    stage = stages[turn % LOADING_STAGES]
                    if self._pin and not stage.pinned_bytes:
                        stage.pin()
                    pieces[turn].copy_(stage.bytes[: sizes[turn]])
                    yield index, pieces[turn]
            finally:
                pool.shutdown(cancel_futures=True)
                for stage in stages:
                    stage.close()

    @property
    def shared_bytes(self) -> int:
        """Host memory that all ranks of the node map."""
        return self._host.nbytes if self._host is not None else 0

    @property
    def pinned_bytes(self) -> int:
        return self._host.pinned_bytes if self._host is not None else 0

    def close(self) -> None:
        """Unlock host memory and let go of the store. No copy from them may be under way."""
        if self._host is not None:
            self._host.close()
        if self.used is not None:
            self.used.close()
