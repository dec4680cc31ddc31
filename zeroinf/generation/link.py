"""Copies keys and values between host memory and the GPU, in both directions, in the order of their use.

Input: units (one layer's keys and values of one micro-batch). Output: staging buffers on the device. The host never
waits. It knows nothing of weights, which share the link.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from zeroinf.engines.stream.transfer import new_event, new_stream
from zeroinf.generation.upload import to_device
from zeroinf.model.cache_layout import FETCHED_UNITS, LONG_RUN_BYTES, SENT_UNITS

# So many copies take the host no longer than a kernel, and the GPU's multiprocessors nothing.
_FEW_RUNS = 4


@dataclass(frozen=True, slots=True)
class Run:
    """`count` records side by side: in a unit from `at` on, in host memory from `place` on."""

    at: int
    place: int
    count: int

    def within(self, records: torch.Tensor) -> torch.Tensor:
        """Its part of a unit's records (records, bytes)."""
        return records[self.at : self.at + self.count]

    def of(self, unit: Unit) -> torch.Tensor:
        """Its part of the unit's host memory."""
        return unit.memory[self.place : self.place + self.count]


class Runs:
    """The runs of a unit, which all layers of a forward have in common; they cross in one direction."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = runs
        self.records = sum(run.count for run in runs)
        """Records that cross the link."""

    @cached_property
    def table(self) -> torch.Tensor:
        """(runs, 3), int64, on the current GPU: made on the stream that is current at the first use."""
        flat = [number for run in self.runs for number in (run.at, run.place, run.count)]
        return to_device(flat, torch.device("cuda", torch.cuda.current_device())).view(-1, 3)


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """The keys and values of one layer for the rows of one micro-batch: `memory` (places, bytes) of the layer, on the
    host.
    """

    layer: int
    memory: torch.Tensor
    records: int
    runs: Runs
    mapped: torch.Tensor | None = None
    """The same memory as the GPU sees it, where a kernel can copy all runs; None where each takes a copy."""

    @property
    def nbytes(self) -> int:
        """Bytes that cross the link."""
        return self.runs.records * self.memory.shape[1]

    @property
    def has_short_runs(self) -> bool:
        """Whether one kernel copies all runs sooner than the host asks copy engines for each."""
        return len(self.runs.runs) > _FEW_RUNS and self.nbytes < len(self.runs.runs) * LONG_RUN_BYTES

    def fetch(self, records: torch.Tensor) -> None:
        """Copy its runs into `records` (records, bytes) on the device, on the current stream."""
        if self.mapped is not None and self.has_short_runs:
            _copy_runs(self.mapped, records, self.runs, fetch=True)
            return
        for run in self.runs.runs:
            run.within(records).copy_(run.of(self), non_blocking=True)

    def send(self, records: torch.Tensor) -> None:
        """Copy its runs from `records` (records, bytes) on the device to host memory, on the current stream."""
        if self.mapped is not None and self.has_short_runs:
            _copy_runs(records, self.mapped, self.runs, fetch=False)
            return
        for run in self.runs.runs:
            run.of(self).copy_(run.within(records), non_blocking=True)


class Link:
    """Moves units between host memory and staging on the device, without making the host wait.

    `begin` says which units the next pass will take, in order; as many as there is staging for are under way before
    their turn. They cross on `stream`, that of the weights, or on one of their own; what goes back, on another one.
    A unit is not fetched before all that was sent of its layer in the pass before has left.
    """

    def __init__(self, staging: tuple[int, int], layers: int, device: torch.device, stream: Any) -> None:
        """`staging`: bytes on the device for units that arrive, and for those that leave."""
        self._in = stream if stream is not None else new_stream(device)
        self._out = new_stream(device)
        self._fetched, self._sent = _Slots(staging[0], FETCHED_UNITS, device), _Slots(staging[1], SENT_UNITS, device)
        self._written = [new_event(device) for _ in range(layers)]
        self._waiting: deque[Unit] = deque()
        self._coming: deque[Unit] = deque()
        self._moves = device.type != "meta"
        self._is_held = False
        self.fetched_bytes = self.sent_bytes = 0

    @property
    def staging_bytes(self) -> int:
        return self._fetched.nbytes + self._sent.nbytes

    def begin(self, units: Sequence[Unit]) -> None:
        """The pass before is enqueued, or broke; the next one will take `units`."""
        self._let_go()
        self._fetched.drop()
        self._sent.drop()
        self._coming.clear()
        self._waiting = deque(units)
        self._fetch()

    def take(self, unit: Unit) -> torch.Tensor:
        """The records of `unit` (records, bytes), uint8, for what is enqueued until the next call.

        Records that none of its runs covers hold anything. Raises RuntimeError when it is not the next unit's turn.
        """
        self._let_go()
        self._fetch()
        if not self._coming or self._coming[0] is not unit:
            raise RuntimeError(f"keys and values of block {unit.layer} are asked for out of order")
        self._coming.popleft()
        self._is_held = True
        return _shaped(self._fetched.wait(), unit)

    @contextmanager
    def sending(self, unit: Unit) -> Iterator[torch.Tensor]:
        """Room for the new records of `unit` (records, bytes), uint8; they leave when the context ends."""
        records = _shaped(self._sent.claim(), unit)
        yield records
        self._sent.full()
        self.sent_bytes += unit.nbytes
        with _on(self._out):
            self._sent.wait()
            if self._moves:
                unit.send(records)
            self._sent.free()
            _record(self._written[unit.layer])

    def written(self, layer: int) -> Any:
        """The event after which all that was sent of `layer` is in host memory; None without a GPU."""
        return self._written[layer]

    def _let_go(self) -> None:
        """All that is enqueued so far is the last use of the unit that was taken."""
        if self._is_held:
            self._fetched.free()
        self._is_held = False

    def _fetch(self) -> None:
        while self._waiting and self._fetched.has_room:
            unit = self._waiting.popleft()
            self._coming.append(unit)
            self.fetched_bytes += unit.nbytes
            with _on(self._in):
                _wait(self._written[unit.layer])
                records = _shaped(self._fetched.claim(), unit)
                if self._moves:
                    unit.fetch(records)
                self._fetched.full()


class _Slots:
    """A ring of `count` pieces of device memory: claimed, filled, waited for, and free again, each time in order.

    Each call is meant for the current stream.
    """

    def __init__(self, nbytes: int, count: int, device: torch.device) -> None:
        self.nbytes = nbytes
        self._slots = torch.empty(nbytes, dtype=torch.uint8, device=device).chunk(count)
        self._full = [new_event(device) for _ in range(count)]
        self._free = [new_event(device) for _ in range(count)]
        self._claimed = self._waited = self._freed = 0

    @property
    def has_room(self) -> bool:
        return self._claimed - self._freed < len(self._slots)

    def claim(self) -> torch.Tensor:
        """A slot to fill, once its last use is over."""
        at = self._claimed % len(self._slots)
        self._claimed += 1
        _wait(self._free[at])
        return self._slots[at]

    def full(self) -> None:
        """Note that what is enqueued so far has filled the slot that was claimed last."""
        _record(self._full[(self._claimed - 1) % len(self._slots)])

    def wait(self) -> torch.Tensor:
        """The next slot that was filled, once it is."""
        at = self._waited % len(self._slots)
        self._waited += 1
        _wait(self._full[at])
        return self._slots[at]

    def free(self) -> None:
        """Note that what is enqueued so far is the last use of the next slot."""
        _record(self._free[self._freed % len(self._slots)])
        self._freed += 1

    def drop(self) -> None:
        """Nobody is going to use what was claimed, and is not free yet."""
        self._waited = self._freed = self._claimed


def _copy_runs(source: torch.Tensor, target: torch.Tensor, runs: Runs, *, fetch: bool) -> None:
    from zeroinf.generation.attention_kernels import copy_runs

    copy_runs(source, target, runs.table, fetch=fetch)


def _shaped(slot: torch.Tensor, unit: Unit) -> torch.Tensor:
    nbytes = unit.memory.shape[1]
    return slot[: unit.records * nbytes].view(unit.records, nbytes)


def _on(stream: Any) -> Any:
    return torch.cuda.stream(stream) if stream is not None else nullcontext()


def _wait(event: Any) -> None:
    if event is not None:
        torch.cuda.current_stream().wait_event(event)


def _record(event: Any) -> None:
    if event is not None:
        event.record()
