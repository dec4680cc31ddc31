"""Expands quantized weights: a module holds the tensors of its checkpoint, and has full weights only while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from math import prod
from typing import Any, Literal
from weakref import WeakKeyDictionary, ref

import torch
from torch.nn import Module, Parameter

from zeroinf.compat.dispatch import TorchDispatchMode, is_view
from zeroinf.compat.launches import Recording
from zeroinf.compat.modules import own_parameters
from zeroinf.errors import ModelError
from zeroinf.model.quantized.expert_codes import ExpertCodes

Held = Mapping[str, torch.Tensor]


Expand = Callable[[Held], Mapping[str, torch.Tensor]]
"""From what a module holds to the parameters that its forward uses."""

OTHER_CHECKPOINT = "take the model's unquantized checkpoint, and --wire int8 or int4 to move fewer bytes"
"""What to do about a checkpoint that does not run."""


_ALIGNMENT = 256


class ExpansionSlot:
    """Memory in which one block's weights after the other's are expanded: those of like blocks at like addresses."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        """Take `nbytes` of the memory of `device`."""
        self._memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.end = 0
        """Bytes in use, from the first on. Who sets this back gives up what has been expanded since."""

    def take(self, shape: Iterable[int], dtype: torch.dtype) -> torch.Tensor | None:
        """A tensor in the next bytes; None where there are not enough."""
        size = tuple(shape)
        start, self.end = self.end, self.end + slot_bytes(size, dtype)
        if self.end > self._memory.numel():
            self.end = start
            return None
        return self._memory[start : start + prod(size) * dtype.itemsize].view(dtype).view(size)

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` lies in this memory."""
        return tensor.untyped_storage().data_ptr() == self._memory.untyped_storage().data_ptr()


def slot_bytes(shape: Iterable[int], dtype: torch.dtype) -> int:
    """Bytes of a slot that a tensor takes."""
    return -(-prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT


_slot: ContextVar[ExpansionSlot | None] = ContextVar("slot", default=None)


def whole_weights(
    shape: Iterable[int], dtype: torch.dtype, device: torch.device, *, is_transposed: bool = False
) -> torch.Tensor:
    """An empty tensor to expand weights into: in the slot of what is being opened, if that has one, else in new
    memory. Its rows lie one after the other; with `is_transposed`, (..., inputs, outputs), its columns do, which are
    the rows of what is stored and what products read."""
    size = tuple(shape)
    if is_transposed:
        size = (*size[:-2], size[-1], size[-2])
    slot = _slot.get()
    taken = slot.take(size, dtype) if slot is not None else None
    whole = torch.empty(size, dtype=dtype, device=device) if taken is None else taken
    return whole.mT if is_transposed else whole


class _Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees whether operators of torch that are called do more than return views."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.are_views = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.are_views = self.are_views and is_view(func)
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True, slots=True)
class _Visit:
    """Expanded weights, the launches that made them, and where those of the next module begin in the slot."""

    launches: Recording
    made: Mapping[str, torch.Tensor]
    end: int


class Expansion:
    """Gives `module` its weights in full: for the time of its own forward, or from `open` until `close`.

    In between it has what its checkpoint holds and nothing more.
    """

    def __init__(
        self, module: Module, expand: Expand, codes: Callable[[Held], Mapping[str, ExpertCodes]] | None = None
    ) -> None:
        """Let `module` run with what `expand` makes of its own parameters. `codes` gives the codes of the weights of
        experts, by the names of these."""
        self._own: dict[str, Any] = own_parameters(module)
        self._expand, self._run, self._codes = expand, module.forward, codes
        self._held: dict[str, Any] | None = None
        self._multiplies: Callable[[], bool] | None = None
        self._visits: dict[tuple[Any, ...], _Visit | Literal["seen", "expanded anew"]] = {}
        """What can be done again, by slot, place in it, and addresses of what is held."""
        module.forward = self._forward
        _of_modules[module] = ref(self)

    @property
    def has_codes(self) -> bool:
        """Whether products can be computed with codes."""
        return self._codes is not None

    def rest(self, multiplies: Callable[[], bool]) -> None:
        """Leave weights as codes: as long as `multiplies` says so, the module multiplies by these."""
        self._multiplies = multiplies

    @property
    def rests(self) -> bool:
        """Whether the module multiplies by codes."""
        return self._multiplies is not None

    def codes(self) -> Mapping[str, ExpertCodes]:
        """What the module holds now, by the names of its weights."""
        assert self._codes is not None
        return self._codes(self._own)

    def open(self, slot: ExpansionSlot | None = None) -> None:
        """Expand what the module holds now, into `slot` if there is one with room. The third time that what it holds
        lies at the same addresses, and on, the kernels of the second time are launched again, and nothing else."""
        made = self._expanded_into(slot) if slot is not None else self.expanded()
        self._held = dict(self._own)
        self._own.update(made)

    def _expanded_into(self, slot: ExpansionSlot) -> Mapping[str, torch.Tensor]:
        key = slot, slot.end, *[0 if each is None else each.data_ptr() for each in self._own.values()]
        known = self._visits.get(key)
        if isinstance(known, _Visit):
            slot.end = known.end
            known.launches.repeat()
            return known.made
        is_second = known == "seen"
        token, calls, recording = _slot.set(slot), _Calls(), Recording()
        try:
            with calls if is_second else nullcontext(), recording.recording():
                made = self.expanded()
        finally:
            _slot.reset(token)
        if known is None:
            self._visits[key] = "seen"
        elif is_second:
            can_repeat = recording.is_whole and calls.are_views and all(map(slot.holds, made.values()))
            self._visits[key] = _Visit(recording, made, slot.end) if can_repeat else "expanded anew"
        return made

    def expanded(self) -> Mapping[str, torch.Tensor]:
        """What the module's weights would be now, without giving them to it."""
        return self._expand({name: tensor for name, tensor in self._own.items() if tensor is not None})

    def close(self) -> None:
        """Let go of the weights, if there are any."""
        if self._held is not None:
            self._own.clear()
            self._own.update(self._held)
            self._held = None

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._held is not None or (self._multiplies is not None and self._multiplies()):
            return self._run(*args, **kwargs)
        self.open()
        try:
            return self._run(*args, **kwargs)
        finally:
            self.close()


_of_modules: WeakKeyDictionary[Module, ref[Expansion]] = WeakKeyDictionary()
"""Which lives as long as its module's forward, and holds the module."""


def expansion_of(module: Module) -> Expansion | None:
    """What gives `module` its weights in full; None where they are."""
    found = _of_modules.get(module)
    return None if found is None else found()


def expansions(module: Module) -> list[Expansion]:
    """The expansions of `module` and all modules inside, but for weights that are multiplied as codes, and for modules
    whose forward is replaced by what expands a part of them at a time."""
    found = (getattr(inner.forward, "__self__", None) for inner in module.modules())
    return [owner for owner in found if isinstance(owner, Expansion) and not owner.rests]


@contextmanager
def opened(some: Iterable[Expansion]) -> Iterator[None]:
    """While it lasts, the modules of `some` expansions have their weights in full."""
    with ExitStack() as stack:
        for expansion in some:
            expansion.open()
            stack.callback(expansion.close)
        yield


def expanded_bytes(opened: Iterable[Expansion]) -> int:
    """Bytes of a slot that the weights of modules take whose tensors are on the meta device."""
    total = 0
    for expansion in opened:
        total += sum(slot_bytes(tensor.shape, tensor.dtype) for tensor in expansion.expanded().values())
    return total


def meta(shape: tuple[int, ...], dtype: torch.dtype) -> Parameter:
    """A parameter on the meta device that takes no gradient, as the checkpoint has it."""
    return Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)


def refused(model: Any, what: str, why: str) -> ModelError:
    """The error for a checkpoint of `model` that is quantized as `what`, and `why` that does not run."""
    return ModelError(
        f"the checkpoint of {type(model).__name__} is quantized already, as {what}, which does not stream: {why}",
        hint=OTHER_CHECKPOINT,
    )
