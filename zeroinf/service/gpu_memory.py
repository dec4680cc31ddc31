"""Guards a rank's GPU memory: enforces the limit, checks for free memory before each large allocation, and records what
was used.
"""

from __future__ import annotations

from contextlib import ExitStack, suppress
from dataclasses import dataclass

import torch

from zeroinf.compat.allocator import expandable_segments
from zeroinf.compat.threads import few_threads
from zeroinf.engines.registry import descriptor_of
from zeroinf.errors import DoesNotFitError, EnvironmentProblem
from zeroinf.hardware.gpus import read_gpus, read_used_bytes
from zeroinf.planner.allocator import LARGE_PAGE_BYTES
from zeroinf.planner.memory import GRAPHS, OUTSIDE_TORCH, SMALL_PAGES, UNFORESEEN
from zeroinf.planner.plan import Plan
from zeroinf.sizes import Share, limit_of


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuUse:
    """GPU memory that a run used, in bytes."""

    loaded: int
    """Allocated by loading weights, slots among them."""
    slots: int
    cache: int
    """The KV cache's pool."""
    allocated: int
    """The most that was allocated at any time."""
    reserved: int
    """The most that torch's allocator held."""
    process: int | None
    """What the GPU's memory in use grew by since before the run, at its end; None where NVML does not tell."""


def _start_libraries(plan: Plan, device: torch.device) -> None:
    """Let matrix product libraries take their workspaces now, before there are gaps that they would keep open."""
    # cuDNN's attention builds a plan for each new length of the cache: 44 ms a token on an H200 (docs/decisions/0008).
    torch.backends.cuda.enable_cudnn_sdp(False)
    weight = torch.ones(16, 16, dtype=getattr(torch, plan.dtype), device=device)
    torch.nn.functional.linear(weight, weight)
    torch.nn.functional.linear(weight, weight, weight[0])


def _mapped(device: torch.device) -> int:
    """Bytes of torch's pool of large tensors."""
    mapped: int = torch.cuda.memory_stats(device)["reserved_bytes.large_pool.current"]
    return mapped


def _taken(nbytes: int, device: torch.device) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device=device)


def _bytes_of(limit: int | Share | None, device: torch.device) -> int | None:
    """The limit as the plan has it: a share is one of what NVML, or where it does not tell CUDA, says there is."""
    if not isinstance(limit, Share):
        return limit
    return limit_of(limit, read_gpus()[device.index].total_bytes)


class GpuMemory:
    """Guards one GPU for one plan. To be made before anything touches the GPU."""

    def __init__(self, plan: Plan, device: torch.device, limit: int | Share | None) -> None:
        self._plan, self._device = plan, device
        self._outside_torch = sum(t.nbytes for t in plan.terms if t.place == "gpu" and t.name in OUTSIDE_TORCH)
        self._planned = sum(t.nbytes for t in plan.terms if t.place == "gpu" and t.name != UNFORESEEN)
        self._used_before = self._used()
        self._limit: int | None = None
        self._loaded = self._loading_peak = 0
        self._closing = ExitStack()
        try:
            self._start(_bytes_of(limit, device))
        except BaseException:
            self.close()
            raise

    def _start(self, limit_bytes: int | None) -> None:
        # The plan replays the allocator with segments that grow (planner/allocator.py); other settings round otherwise.
        self._closing.enter_context(expandable_segments())
        self._closing.callback(torch.cuda.empty_cache)
        torch.cuda.set_device(self._device)
        used_cudnn = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
        self._closing.callback(torch.backends.cuda.enable_cudnn_sdp, used_cudnn)
        self._closing.enter_context(few_threads())
        _start_libraries(self._plan, self._device)
        self._workspaces = torch.cuda.memory_allocated(self._device)
        if limit_bytes is not None:
            self._limit = limit_bytes - self._outside_torch
            total = torch.cuda.get_device_properties(self._device).total_memory
            self._closing.callback(torch.cuda.set_per_process_memory_fraction, 1.0, self._device)
            torch.cuda.set_per_process_memory_fraction(min(1.0, self._limit / total), self._device)

    def check(self) -> None:
        """Raise DoesNotFitError if the GPU no longer has what the plan still needs."""
        missing = self._missing()
        if missing > 0:
            raise self._lacks(missing)

    def plan_that_fits(self) -> Plan:
        """The plan, with as many rows as still fit beside what is loaded if another process has taken memory; if none
        has, all that the plan needs is taken now.

        Raises DoesNotFitError when not even one row fits.
        """
        self._loaded = torch.cuda.memory_allocated(self._device) - self._workspaces
        missing = self._missing()
        if missing <= 0:
            self._take_all()
            return self._plan
        growing = sum(t.nbytes for t in self._plan.terms if t.place == "gpu" and t.grows)
        rows = self._plan.batch_size * (growing - missing) // max(growing, 1)
        if rows < 1:
            raise self._lacks(missing)
        return self._plan.with_rows(int(rows))

    def use(self, slot_bytes: int, cache_bytes: int) -> GpuUse:
        """Memory that was taken until now."""
        used = self._used()
        return GpuUse(
            loaded=self._loaded,
            slots=slot_bytes,
            cache=cache_bytes,
            allocated=max(self._loading_peak, torch.cuda.max_memory_allocated(self._device)),
            reserved=torch.cuda.max_memory_reserved(self._device),
            process=None if used is None or self._used_before is None else used - self._used_before,
        )

    def close(self) -> None:
        """Lift the limit, let torch give back what it holds and nobody uses, and set its allocator as it was."""
        self._closing.close()

    def _take_all(self) -> None:
        """Let torch get what the plan still needs from the driver, as one piece that it keeps.

        Nobody else can take it then; and under a limit torch, which does not grow by the little that an allocation
        lacks where the limit leaves no room for all of it, has no need to (docs/decisions/0007-planner.md).
        """
        if not descriptor_of(self._plan.engine).is_replayed:
            return
        elsewhere = sum(t.nbytes for t in self._plan.terms if t.place == "gpu" and t.name in (SMALL_PAGES, GRAPHS))
        wanted = self._planned - self._outside_torch - elsewhere
        self._loading_peak = torch.cuda.max_memory_allocated(self._device)
        held = []
        with suppress(torch.OutOfMemoryError):
            # What is free at the end already is part of the first piece, so a second one may be needed.
            while (pages := (wanted - _mapped(self._device)) // LARGE_PAGE_BYTES) > 0:
                held.append(_taken(pages * LARGE_PAGE_BYTES, self._device))
        del held
        torch.cuda.reset_peak_memory_stats(self._device)

    def _lacks(self, missing: int) -> DoesNotFitError:
        return DoesNotFitError(
            f"GPU {self._device.index} lacks {missing / 2**30:.2f} GiB of what the plan needs: another process has "
            "taken memory since the plan was made",
            hint="run it again, and it plans with what is free then",
        )

    def _missing(self) -> int:
        """Bytes that torch still has to get for the plan, less what can be had."""
        reserved = torch.cuda.memory_reserved(self._device)
        free, _ = torch.cuda.mem_get_info(self._device)
        if self._limit is not None:
            free = min(free, self._limit - reserved)
        return self._planned - self._outside_torch - reserved - free

    def _used(self) -> int | None:
        gpus = read_gpus()
        if self._device.index >= len(gpus) or (uuid := gpus[self._device.index].uuid) is None:
            return None
        try:
            return read_used_bytes(uuid)
        except EnvironmentProblem:
            return None
