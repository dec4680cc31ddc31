"""Launches Triton's kernels without its binder, which takes the host longer than a short kernel takes the GPU.

The first launch of a kind goes through Triton, which compiles the kernel for what it is given: the dtypes of tensors,
whether they begin at a multiple of 16 bytes, whether a number is 1 or a multiple of 16, and constants. Later launches
of that kind hand addresses and numbers to the same compiled kernel. Triton's hooks for profilers see the first alone.

Relies on what Triton 3.6 and 3.7 do, which come with torch 2.11 and newer: `JITFunction.run` gives the compiled kernel
back, whose `run` takes a grid, a stream, `function`, `packed_metadata`, what hooks are told, two hooks, and all
arguments in order, with addresses as integers; the driver says which device and which stream are current. Where any of
that is missing, on GPUs that are not NVIDIA's, and in Triton's interpreter, every launch goes through Triton.
`tests/unit/test_launches.py` fails when it changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch

Current = tuple[Callable[[], int], Callable[[int], int]]
"""Which device is current, and which stream of a device."""


class Recording:
    """Launches that can be made again: of the same kernels, with the same addresses and numbers."""

    def __init__(self) -> None:
        self._launches: list[tuple[Any, ...]] = []
        self.is_whole = True
        """False where a launch went through Triton, which cannot be recorded."""

    @contextmanager
    def recording(self) -> Iterator[None]:
        """While it lasts, launches of this thread are made and noted."""
        token = _recording.set(self)
        try:
            yield
        finally:
            _recording.reset(token)

    def note(self, run: Any, grid: tuple[int, int, int], function: Any, metadata: Any, args: Sequence[Any]) -> None:
        """Note a launch: `run`, of a compiled kernel, took `args`."""
        self._launches.append((run, *grid, function, metadata, args))

    def repeat(self) -> None:
        """Make all launches again, on the current stream. They must be whole."""
        current = current_of_driver()
        if current is None or not self._launches:
            return
        stream = current[1](current[0]())
        for run, first, second, third, function, metadata, args in self._launches:
            run(first, second, third, stream, function, metadata, None, None, None, *args)


_recording: ContextVar[Recording | None] = ContextVar("recording", default=None)


class Launch:
    """Launches one kernel, whose arguments are tensors, then numbers, then constants."""

    def __init__(self, kernel: Any) -> None:
        """`kernel`: what `triton.jit` makes of a function."""
        self._kernel = kernel
        self._bound: dict[tuple[Any, ...], BoundLaunch] = {}

    def __call__(
        self, grid: tuple[int, ...], tensors: Sequence[torch.Tensor], numbers: Sequence[Any] = (), **constants: Any
    ) -> None:
        """Launch it on the current stream of the current device, on which `tensors` are. `constants` include Triton's
        options, such as `num_warps`."""
        self.bind(**constants)(grid, tensors, numbers)

    def bind(self, **constants: Any) -> BoundLaunch:
        """Its launches with these constants, which takes less time where they are many."""
        key = (*constants, *constants.values())
        found = self._bound.get(key)
        if found is None:
            found = self._bound[key] = BoundLaunch(self._kernel, constants)
        return found

    def compile(
        self, grid: tuple[int, ...], tensors: Sequence[torch.Tensor], numbers: Sequence[Any] = (), **constants: Any
    ) -> None:
        """Compile it, and what launches it, for such a launch on the current device. `tensors` are on the meta device,
        and stand for tensors that begin at multiples of 16 bytes."""
        compiled = self._kernel.warmup(*tensors, *numbers, grid=grid, **constants)
        getattr(compiled, "run", None)  # which makes the launcher


class BoundLaunch:
    """Launches one kernel with constants that stay the same."""

    def __init__(self, kernel: Any, constants: dict[str, Any]) -> None:
        self._kernel, self._constants = kernel, constants
        self._known: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        """By kinds of launches, what the launcher of a compiled kernel takes beside grid, stream and arguments."""

    def __call__(self, grid: tuple[int, ...], tensors: Sequence[torch.Tensor], numbers: Sequence[Any] = ()) -> None:
        """Launch it on the current stream of the current device, on which `tensors` are."""
        current, recording = current_of_driver(), _recording.get()
        if current is None:
            if recording is not None:
                recording.is_whole = False
            self._kernel[grid](*tensors, *numbers, **self._constants)
            return
        device = current[0]()
        places = [each.data_ptr() for each in tensors]
        kind = (
            device,
            *[each.dtype for each in tensors],
            *[not place & 15 for place in places],
            *[
                0.5 if each.__class__ is float else None if each == 1 else each & 15 | each >> 31 << 4
                for each in numbers
            ],
        )
        known = self._known.get(kind)
        if known is not None:
            run, function, metadata, rest = known
            first, second, third = (*grid, 1, 1)[:3]
            try:
                run(
                    first, second, third, current[1](device), function, metadata, None, None, None,
                    *places, *numbers, *rest,
                )  # fmt: skip
                if recording is not None:
                    recording.note(run, (first, second, third), function, metadata, (*places, *numbers, *rest))
                return
            except TypeError:  # another Triton takes other things
                self._known.pop(kind)
        if recording is not None:
            recording.is_whole = False
        compiled = self._kernel[grid](*tensors, *numbers, **self._constants)
        with suppress(AttributeError):
            rest = (None,) * (len(self._kernel.arg_names) - len(tensors) - len(numbers))
            self._known[kind] = compiled.run, compiled.function, compiled.packed_metadata, rest


@cache
def current_of_driver() -> Current | None:
    """As Triton's driver has it; None where launches have to go through Triton."""
    try:
        import triton

        driver = triton.runtime.driver.active
        is_known = driver.get_current_target().backend == "cuda"
        return (driver.get_current_device, driver.get_current_stream) if is_known else None
    except (ImportError, AttributeError, RuntimeError):  # there is no driver where kernels are interpreted
        return None
