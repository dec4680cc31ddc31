"""Records what code on the meta device would do on a GPU: every allocation and free in order, and every kernel."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch.nn import Module

from zeroinf.compat.dispatch import (
    GROUPED_MM,
    SAFE_SOFTMAX,
    TorchDispatchMode,
    flop_registry,
    operator_of,
    schema_of,
)
from zeroinf.model import meta_operators
from zeroinf.model.experts import ExpertsOnPaper
from zeroinf.planner.allocator import Event, Events
from zeroinf.planner.workload import Kernel, Kernels, Pattern
from zeroinf.simulation.kernels import product_flops

aten = torch.ops.aten

# Operators that neither read nor compute: they only reserve memory, or hand on what is there.
_NO_KERNEL = {aten.empty, aten.empty_strided, aten.empty_like, aten.new_empty, aten.new_empty_strided, aten.lift_fresh}
# Bytes an element that a kernel holds for itself while its output is there already: a mask of rows without any value.
_OWN_BYTES = {SAFE_SOFTMAX: 1}
# What the rows of a grouped product are padded to (`create_grouped_gemm_output_tensor` in torch's GroupedMMUtils.h).
_GROUPED_ROW_BYTES = 16

_OUTSIDE = -1
_OUT = -1
# Operators that touch some rows of a tensor: which argument says which, and where the rows are, among the arguments or
# in what they return.
_ROWS_OF = {aten.index_select: (2, _OUT), aten.index_copy_: (2, 3), aten.embedding: (1, _OUT)}


def storages_of(model: Module) -> Set[Any]:
    """The storages of all parameters and buffers of `model`."""
    return {tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())}


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, records what happens to meta tensors; what existed before is not counted.

    A value that code asks for is 0 or False, a tensor that moves to the host is full of zeros: no size depends on it.
    """

    def __init__(self, held: Set[Any], blocks: Iterable[Module], split: Iterable[ExpertsOnPaper] = ()) -> None:
        """`held`: the storages of the model, as `storages_of` gives them. Sections begin with each of `blocks`, and
        with each part of experts that are `split`."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._held = held
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()
        self._next_key = 0
        self._sections: list[list[Event]] = [[]]
        self.block_starts: list[int] = []
        """The section, of those that were cut last with blocks in them, with which each block began."""
        self._starts: list[int] = []
        self._kernels: dict[int, list[Kernel]] = defaultdict(list)
        self._section, self._part_from = _OUTSIDE, 0
        self._split = list(split)
        for experts in self._split:
            experts.begins, experts.repeats = self._begin_part, self._repeat_part
        self._notes_memory = self._notes_kernels = True
        self._hooks = [hook for index, block in enumerate(blocks) for hook in self._watch(index, block)]

    def _begin_part(self) -> None:
        self._sections.append([])
        self._part_from = len(self._kernels[self._section])

    def _repeat_part(self, times: int) -> None:
        kernels = self._kernels[self._section]
        kernels += kernels[self._part_from :] * times

    def __exit__(self, *reason: Any) -> Any:
        for hook in self._hooks:
            hook.remove()
        return super().__exit__(*reason)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (found := meta_operators.values(func, args, kwargs)) is not None:
            return found
        out = _grouped_product(*args) if func is GROUPED_MM.default else meta_operators.call(func, args, kwargs)
        is_new = [self._see(tensor) for tensor in _tensors(out)]
        if func in _OWN_BYTES:
            self._pass_through(out.numel() * _OWN_BYTES[func])
        changes = schema_of(func).is_mutable and args[0].device.type == "meta"
        operator = operator_of(func)
        if operator not in _NO_KERNEL and (any(is_new) or changes):
            formula = _FLOPS.get(operator)
            flops = formula(*args, **kwargs, out_val=out) if formula else 0
            touched = _tensors((args, kwargs, out))
            if operator in _ROWS_OF:
                which, rows = _ROWS_OF[operator]
                moved = out if rows == _OUT else args[rows]
                touched = (args[which], moved, moved)
            self.kernel(operator.__name__, flops, touched)
            if func is aten.baddbmm.default:
                self.kernel("copy_", 0, (out, out))  # what is added is first written out in full
        return out

    def kernel(self, operator: str, flops: int, tensors: Sequence[torch.Tensor], more_bytes: int = 0) -> None:
        """Note a kernel of `operator` that reads or writes `tensors`, and takes as long as if it were `more_bytes`."""
        if not self._notes_kernels:
            return
        nbytes = sum(map(_touched, tensors)) + more_bytes
        self._kernels[self._section].append(Kernel(flops, nbytes, operator, _pattern(tensors)))

    @contextmanager
    def memory_alone(self) -> Iterator[None]:
        """While it lasts, no kernels are noted."""
        before, self._notes_kernels = self._notes_kernels, False
        try:
            yield
        finally:
            self._notes_kernels = before

    @contextmanager
    def kernels_alone(self) -> Iterator[None]:
        """While it lasts, what is allocated counts as if it had existed before."""
        before = self._notes_memory, self._notes_kernels
        self._notes_memory, self._notes_kernels = False, True
        try:
            yield
        finally:
            self._notes_memory, self._notes_kernels = before

    def repeat(self, act: Callable[[], Any], times: int) -> None:
        """Note the kernels of `act`, which is called once, as if it had been so many times."""
        found = self._kernels[self._section]
        start = len(found)
        act()
        found += found[start:] * (times - 1)

    def cut(self) -> tuple[Events, ...]:
        """Allocations and frees since the last cut: those before the first block, and those from each block on."""
        sections = tuple(map(tuple, self._sections))
        if self._starts:
            self.block_starts, self._starts = self._starts, []
        self._sections = [[]]
        return sections

    def cut_kernels(self, times: Sequence[float]) -> tuple[Kernels, ...]:
        """Kernels since the last time; block i stands for `times[i]` blocks."""
        kernels = tuple(
            Kernels(1.0 if section == _OUTSIDE else times[section], tuple(found))
            for section, found in sorted(self._kernels.items())
        )
        self._kernels.clear()
        return kernels

    def _watch(self, index: int, block: Module) -> Iterator[Any]:
        def enter(*ignored: Any) -> None:
            self._section = index
            self._starts.append(len(self._sections))
            self._sections.append([])

        def leave(*ignored: Any) -> None:
            self._section = _OUTSIDE

        yield block.register_forward_pre_hook(enter)
        yield block.register_forward_hook(leave)

    def _see(self, tensor: torch.Tensor) -> bool:
        """Note an allocation if `tensor` lies in a storage that is new."""
        storage = tensor.untyped_storage()
        if tensor.device.type != "meta" or storage in self._held or storage in self._known:
            return False
        self._known.add(storage)
        if not self._notes_memory:
            return True
        key = self._key()
        self._sections[-1].append(Event(key, storage.nbytes()))
        weakref.finalize(storage, lambda: self._sections[-1].append(Event(key)))
        return True

    def _pass_through(self, nbytes: int) -> None:
        """An allocation that is over at once."""
        if not self._notes_memory:
            return
        key = self._key()
        self._sections[-1] += [Event(key, nbytes), Event(key)]

    def _key(self) -> int:
        self._next_key += 1
        return self._next_key


def _grouped_product(rows: torch.Tensor, weights: torch.Tensor, *ignored: Any) -> torch.Tensor:
    """Each of `rows` times the weights of its group; torch's own shape function takes nothing but bfloat16."""
    width, unit = weights.shape[-1], _GROUPED_ROW_BYTES // rows.element_size()
    return rows.new_empty(rows.shape[0], -(-width // unit) * unit)[:, :width]


def _grouped_flops(rows: torch.Tensor, weights: torch.Tensor, *ignored: Any, **also_ignored: Any) -> int:
    return 2 * rows.shape[0] * prod(weights.shape[1:])


_FLOPS = {
    **flop_registry,
    GROUPED_MM: _grouped_flops,
    torch.ops.zeroinf.multiply_by_experts: product_flops,
    torch.ops.zeroinf.multiply_mxfp4_by_experts: product_flops,
    torch.ops.zeroinf.multiply_integers_by_experts: product_flops,
}


def _tensors(value: Any) -> Sequence[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return (value,)
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return ()
    return [tensor for item in value for tensor in _tensors(item)]


def _pattern(tensors: Sequence[torch.Tensor]) -> Pattern:
    """Single numbers aside, which every kernel has at hand."""
    arrays = [tensor for tensor in tensors if tensor.numel() > 1]
    if any(_touched(tensor) < tensor.numel() * tensor.element_size() for tensor in arrays):
        return "repeated"
    if len({tensor.numel() for tensor in arrays}) > 1 or not all(tensor.is_contiguous() for tensor in arrays):
        return "crossed"
    return "converted" if len({tensor.dtype for tensor in arrays}) > 1 else "straight"


def _touched(tensor: torch.Tensor) -> int:
    """Bytes behind a tensor's elements; what is expanded is read once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
