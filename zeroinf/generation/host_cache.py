"""The KV cache in host memory: keys and values are transferred to the GPU before their use, new ones are transferred
back. Or, of decode steps, the CPU attends to them where they rest (`zeroinf.generation.host_steps`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache

from zeroinf.compat.host_arrays import mapped
from zeroinf.engines.stream.host_memory import HostMemory
from zeroinf.generation.attention import AttentionKernel, PackedLayer, Scores, StagedView, Tokens
from zeroinf.generation.cache import CacheView, Columns, SharedLayer
from zeroinf.generation.groups import Group
from zeroinf.generation.host_steps import HostSteps, StepLayer, StepView
from zeroinf.generation.link import Link, Run, Runs, Unit
from zeroinf.generation.records import parts, read, write
from zeroinf.hardware.triton import why_no_kernels
from zeroinf.model.anatomy import Anatomy
from zeroinf.model.cache_layout import HostSize, Record
from zeroinf.model.packing import windows_of


class HostCache:
    """One stretch of host memory a layer, in which a row has the same places in each; its tokens lie side by side.

    `stream` is that on which weights cross the link, None where there is none. Memory is page-locked if `pin`, at
    exactly the size that the anatomy says. On the meta device there is none.
    """

    def __init__(
        self,
        model: Any,
        anatomy: Anatomy,
        size: HostSize,
        device: torch.device,
        stream: Any,
        *,
        pin: bool,
        processors: Sequence[int] = (0,),
    ) -> None:
        """`processors` attend where the CPU does."""
        self.size = size
        self._device = device
        self._windows = windows_of(model)
        self._records = anatomy.records(size.dtype)
        nbytes = size.tokens * anatomy.host_token_bytes(size.dtype)
        self._host: HostMemory | None = None
        if device.type != "meta":  # what the CPU attends to lies near the threads that do, which clear it
            self._host = HostMemory(nbytes, pin=pin and not size.cpu_rows, near_gpu=not size.cpu_rows)
        self._memory: dict[int, torch.Tensor] = {}
        self._mapped: dict[int, torch.Tensor] = {}
        """The same memory as the GPU sees it, where its kernels can copy."""
        seen = None
        if self._host is not None and device.type == "cuda" and pin and not why_no_kernels():
            seen = mapped(self._host.bytes.view(torch.int64), device).view(torch.uint8)
        start = 0
        for layer, record in self._records.items():
            end = start + size.tokens * record.nbytes
            held = torch.empty(0, dtype=torch.uint8) if self._host is None else self._host.bytes[start:end]
            self._memory[layer] = held.view(-1, record.nbytes)
            if seen is not None:
                self._mapped[layer] = seen[start:end].view(-1, record.nbytes)
            start = end
        self.steps: HostSteps | None = None
        """For decode steps, where the CPU attends."""
        try:
            if size.cpu_rows and self._host is not None:
                self.steps = HostSteps(anatomy, size, device, processors)
                if pin:
                    self.steps.clear(self._host.bytes)
                    self._host.pin()
            self.link = Link(anatomy.staging_bytes(size), len(anatomy.cache), device, stream)
        except BaseException:  # staging takes GPU memory
            self.close()
            raise

    @property
    def pinned_bytes(self) -> int:
        own = self._host.pinned_bytes if self._host is not None else 0
        return own + (self.steps.pinned_bytes if self.steps is not None else 0)

    def page(self, cache: DynamicCache, columns: Columns, group: Group) -> list[Unit]:
        """Let layers of `cache`, for one forward, read and write what host memory holds of the rows of `group`.

        Returns what the forward will fetch, for `begin`.
        """
        found: list[Unit] = []
        views: dict[int | None, _HostView] = {}
        layers = list(cache.layers)
        for index, record in self._records.items():
            window = self._windows[index]
            if window not in views:
                views[window] = _HostView(columns, group, window)
            view = views[window]
            fetched, sent = view.units(index, self._memory[index], self._mapped.get(index))
            found += [] if fetched is None else [fetched]
            layers[index] = _HostLayer(self.link, record, view, window, fetched, sent)
        cache.layers = layers
        return found

    def pack(self, cache: DynamicCache, tokens: Tokens, group: Group, kernel: AttentionKernel) -> list[Unit]:
        """Let layers of `cache`, for one packed forward of `tokens`, those of `group`, read and write what host memory
        holds.

        Returns what the forward will fetch, for `begin`.
        """
        if self.steps is not None and all(count == 1 for count in group.counts):
            self._pack_steps(cache, self.steps, tokens, group)
            return []
        found: list[Unit] = []
        views: dict[int | None, _PackedHostView] = {}
        for index, record in self._records.items():
            window = self._windows[index]
            if window not in views:
                views[window] = _PackedHostView(tokens, group, window)
            fetched, sent = views[window].units(index, self._memory[index], self._mapped.get(index))
            found += [] if fetched is None else [fetched]
            cache.layers[index] = _PackedHostLayer(self.link, record, views[window], kernel, fetched, sent)
        return found

    def _pack_steps(self, cache: DynamicCache, steps: HostSteps, tokens: Tokens, group: Group) -> None:
        """Let the CPU attend for layers of `cache` in a packed forward of steps."""
        views: dict[int | None, StepView] = {}
        room = steps.take(tokens.total)
        for index, record in self._records.items():
            window = self._windows[index]
            if window not in views:
                views[window] = StepView(tokens, group, window)
            layer = StepLayer(steps, record, self._memory[index], views[window], room, self.link.written(index))
            cache.layers[index] = layer

    def begin(self, batches: Sequence[Sequence[Unit]]) -> None:
        """The next pass runs micro-batches that fetch `batches`, in this order in each block."""
        if self.steps is not None:
            self.steps.begin()
        units = [unit for batch in batches for unit in batch]
        self.link.begin(sorted(units, key=lambda unit: unit.layer))

    def close(self) -> None:
        """Unlock the memory, once nothing is on its way to it or from it."""
        if self.steps is not None:
            self.steps.close()
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        if self._host is not None:
            self._host.close()


class _HostView(CacheView):
    """The records that layers of one window fetch and send back."""

    def __init__(self, columns: Columns, group: Group, window: int | None) -> None:
        super().__init__(columns, window)
        self._rows, self._new = len(group.seats), columns.new
        fetched, sent = list[Run](), list[Run]()
        for row, (seat, start, count) in enumerate(zip(group.seats, group.starts, group.counts, strict=True)):
            if seat.has_left:  # its places may be another row's
                continue
            assert seat.host_start is not None
            first = max(0, start + count - self.seen)
            if first < start:
                column = self.seen - start - count + first
                fetched.append(Run(row * self.seen + column, seat.host_start + first, start - first))
            sent.append(Run((row + 1) * columns.new - count, seat.host_start + start, count))
        self._fetched, self._sent = Runs(fetched), Runs(sent)
        self.empty: torch.Tensor | None = None
        """(rows, seen, 1), bool: columns without a token; None where there is none."""
        if fetched and (columns.is_padded or any(seat.has_left for seat in group.seats)):
            self.empty = (self.positions < 0)[:, :, None]
            for row, seat in enumerate(group.seats):
                if seat.has_left:
                    self.empty[row] = True

    def units(self, layer: int, memory: torch.Tensor, seen: torch.Tensor | None) -> tuple[Unit | None, Unit]:
        """The unit that is fetched of a layer, if any, and the one that is sent; its memory as the host sees it, and as
        the GPU does, where its kernels can copy."""
        fetched = Unit(layer, memory, self._rows * self.seen, self._fetched, seen) if self._fetched.runs else None
        return fetched, Unit(layer, memory, self._rows * self._new, self._sent, seen)


class _HostLayer(SharedLayer):
    def __init__(
        self, link: Link, record: Record, view: _HostView, window: int | None, fetched: Unit | None, sent: Unit
    ) -> None:
        super().__init__(view, window)
        self._link, self._record, self._view = link, record, view
        self._fetched, self._sent = fetched, sent

    def _keep(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        view, record, rows = self._view, self._record, keys.shape[0]
        with self._link.sending(self._sent) as records:
            new = records.view(rows, -1, records.shape[1])
            write(record, new, keys, values)
            if self._fetched is None:  # codes are attended to as codes at once: how prompts are cut changes nothing
                return (keys, values) if record.dtype == "model" else read(record, new)
            seen = self._link.take(self._fetched).view(rows, -1, records.shape[1])
            if view.empty is not None:  # what is masked is multiplied by 0, which NaN would survive
                seen.masked_fill_(view.empty, 0)
            tail = seen[:, view.seen - new.shape[1] :]
            tail.copy_(new if view.fresh is None else torch.where(view.fresh[:, :, None], new, tail))
        return read(record, seen)


class _PackedHostView(StagedView):
    """The records that layers of one window fetch and send back, those of a row side by side."""

    def __init__(self, tokens: Tokens, group: Group, window: int | None) -> None:
        super().__init__(tokens, window)
        fetched, sent, at = list[Run](), list[Run](), 0
        of_each = zip(group.seats, tokens.starts, tokens.counts, tokens.firsts, strict=True)
        for seat, start, count, new in of_each:
            assert seat.host_start is not None
            first = self.first_seen(start)
            if first < start:
                fetched.append(Run(at, seat.host_start + first, start - first))
            at += start - first
            sent.append(Run(new, seat.host_start + start, count))
        self._fetched, self._sent = Runs(fetched), Runs(sent)

    def units(self, layer: int, memory: torch.Tensor, seen: torch.Tensor | None) -> tuple[Unit | None, Unit]:
        """The unit that is fetched of a layer, if any, and the one that is sent; its memory as the host sees it, and as
        the GPU does, where its kernels can copy."""
        fetched = Unit(layer, memory, self.total, self._fetched, seen) if self._fetched.runs else None
        return fetched, Unit(layer, memory, self.tokens.total, self._sent, seen)


class _PackedHostLayer(PackedLayer):
    """Rows attend to what was fetched of them, and to new keys and values as they will rest in host memory."""

    def __init__(
        self,
        link: Link,
        record: Record,
        view: _PackedHostView,
        kernel: AttentionKernel,
        fetched: Unit | None,
        sent: Unit,
    ) -> None:
        super().__init__((), view, kernel)
        self._link, self._record, self._fetched, self._sent = link, record, fetched, sent

    def attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scores: Scores) -> torch.Tensor:
        record = self._record
        with self._link.sending(self._sent) as new:
            write(record, new[None], keys[None], values[None])
            if record.dtype != "model":  # codes are attended to as codes at once: how prompts are cut changes nothing
                keys, values = (each[0] for each in read(record, new[None]))
            held = new if self._fetched is None else self._link.take(self._fetched)
            self.memory = parts(record, held)
            return super().attend(query, keys, values, scores)
