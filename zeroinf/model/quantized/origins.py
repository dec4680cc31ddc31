"""Finds where the tensors of a checkpoint are in a model of which transformers renames, splits or fuses weights.

transformers' own conversion is undone with numbers in place of weights, which tell what each tensor of the checkpoint
is part of; its forward names tell which of several possible names the files use.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch

from zeroinf.compat.loading import as_in_checkpoint, conversions, converted_name
from zeroinf.model.quantized.expansion import refused
from zeroinf.model.stored_parts import StoredPart, as_stored, parts_of, set_parts

EXPERT = re.compile(r"(?<=\.experts\.)\d+(?=\.)")
"""Where a name has the number of an expert."""
# Rows of a matrix are told apart by so many marks as it goes through transformers' conversion: a fourth each.
_MARKS = 4


def is_fused(model: Any) -> bool:
    """Whether transformers fuses experts of `model`, which lie apart in its checkpoint."""
    return any(not origin.is_whole for origin in origins_of(model, "").whole.values())


def name_parts(model: Any) -> None:
    """Say of every parameter of `model` what it is made of in the checkpoint, where nothing says so yet.

    Raises ModelError where transformers fuses weights in a way that cannot be undone.
    """
    name_others(model, origins_of(model, "weights that an adapter changes"))
    for name, parameter in model.named_parameters():
        if parts_of(parameter) is None:
            set_parts(parameter, (StoredPart((name,), as_stored),))


@dataclass(frozen=True, slots=True)
class Origin:
    """A tensor of the checkpoint: rows `first` to `end` of `parameter`, of its matrix `number` if that is a stack."""

    parameter: str
    number: int
    first: int
    end: int
    is_whole: bool = True
    """It is all of `parameter`."""


@dataclass(frozen=True, slots=True)
class Origins:
    """What the parameters of a model are made of in its checkpoint."""

    whole: dict[str, Origin]
    """By the names of tensors of the checkpoint, of which all is in one parameter, in order."""
    rows: dict[str, StoredPart]
    """By the names of parameters, others: rows of one tensor of the checkpoint."""

    def layers_by_row(self) -> Iterator[str]:
        """Layers of the checkpoint whose rows go to several parameters, or into another order."""
        yield from {part.names[0].rpartition(".")[0] for part in self.rows.values()}


class _Marks:
    """Numbers for rows of parameters, by which each tensor of a checkpoint tells what it is part of.

    A matrix has `_MARKS` of them, as if it had no more rows; `in_full`, one for each row, if it is in no stack.
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor], *, in_full: bool) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._parameters, self._in_full = parameters, in_full
        self._names, self._starts, self._end = list(parameters), list[int](), 0
        for name, parameter in parameters.items():
            stack = parameter.shape[:1] if parameter.dim() == 3 else ()
            shape = (*stack, self._count(name), *[1] * (parameter.dim() - len(stack) - 1))
            marks = torch.Size(shape).numel()
            self.tensors[name] = torch.arange(self._end, self._end + marks, device="cpu").view(shape)
            self._starts.append(self._end)
            self._end += marks

    def _count(self, name: str) -> int:
        parameter = self._parameters[name]
        return parameter.shape[0] if self._in_full and parameter.dim() != 3 else _MARKS

    def origin(self, value: torch.Tensor) -> Origin | None:
        """Where a tensor with the marks `value` is; None where it is not a run of rows of one parameter."""
        own = value.flatten().tolist()
        first, end = min(own), max(own) + 1
        at = bisect_right(self._starts, first) - 1
        name = self._names[at]
        parameter, marks = self._parameters[name], self._count(name)
        rows = parameter.shape[-2:][0] if parameter.dim() > 1 else parameter.shape[0]
        number, mark = divmod(first - self._starts[at], marks)
        is_run = len(own) == end - first and (not self._in_full or own == [*range(first, end)])
        if not is_run or end > self._starts[at] + self.tensors[name].numel() or (mark and rows % marks):
            return None
        if parameter.dim() == 3 and value.dim() == 3:
            number, mark, end = 0, 0, first + marks  # a stack in the checkpoint too
        at_rows = mark * rows // marks, (mark + end - first) * rows // marks
        return Origin(name, number, *at_rows, is_whole=len(own) == self.tensors[name].numel())

    def by_rows(self, stored: str, value: torch.Tensor) -> dict[str, StoredPart]:
        """The parameters that are made of rows of the tensor `stored`, whose marks are `value`; none where some are
        stacks, or have rows of other tensors too."""
        if not self._in_full:
            return {}
        found, marks = {}, value.flatten()
        for at in sorted({bisect_right(self._starts, mark) - 1 for mark in marks.tolist()}):
            name, start = self._names[at], self._starts[at]
            count = self.tensors[name].numel()
            inside = (marks >= start) & (marks < start + count)
            if self._parameters[name].dim() == 3 or int(inside.sum()) != count:
                return {}
            places = torch.empty(count, dtype=torch.int64, device="cpu")
            places[marks[inside] - start] = inside.nonzero()[:, 0]
            found[name] = StoredPart((stored,), partial(_rows, places))
        return found


def _rows(places: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
    return stored[places]


def _stored_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Parameters, and buffers that checkpoints hold."""
    found, kept = dict(model.named_parameters()), model.state_dict().keys()
    return found | {name: buffer for name, buffer in model.named_buffers() if name in kept}


def origins_of(model: Any, what: str, names: Collection[str] | None = None) -> Origins:
    """The place in `model` of each tensor of the checkpoint, by the name that it has there.

    transformers' conversion is undone with numbers for rows, a few for each matrix, or one for each row where a
    conversion asks for all. `names` of the files, if these are known, tell which of several they use.
    """
    parameters = _stored_tensors(model)
    if not conversions(model, of_old_names=False):
        return Origins({name: Origin(name, 0, 0, parameter.shape[0]) for name, parameter in parameters.items()}, {})
    try:
        marks = _Marks(parameters, in_full=False)
        stored = as_in_checkpoint(model, marks.tensors)
    except RuntimeError:  # a conversion that asks for all rows, such as that of Kimi's images
        marks = _Marks(parameters, in_full=True)
        stored = as_in_checkpoint(model, marks.tensors)
    called = _Names(model, names or ())
    whole, rows = dict[str, Origin](), dict[str, StoredPart]()
    for name, value in stored.items():
        origin = marks.origin(value)
        if origin is not None:
            whole[called.in_files(name)] = origin
            continue
        parts = marks.by_rows(called.in_files(name), value)
        if not parts:
            raise refused(model, what, f"transformers fuses {name} with other weights row by row")
        rows |= parts
    return Origins(whole, rows)


class _Names:
    """Names in files, where transformers' undone conversion gives others that it takes as well."""

    def __init__(self, model: Any, names: Collection[str]) -> None:
        """`names` of the files, without numbers of experts."""
        self._model, self._own = model, model.state_dict()
        self._names, self._layers = set(names), {name.rpartition(".")[0] for name in names}

    def in_files(self, name: str) -> str:
        """What files call the tensor `name`, or those that its layer has in its place."""
        plain, number = EXPERT.sub("*", name), next(iter(EXPERT.findall(name)), "")
        layer, _, suffix = plain.rpartition(".")
        if not self._names or plain in self._names or layer in self._layers:
            return name
        place = self._place(plain)
        found = self._by_place.get(place) or f"{self._by_layer.get(place, layer)}.{suffix}"
        return found.replace("*", number)

    def _place(self, name: str) -> tuple[str, str | None]:
        """The tensor of the model that transformers makes of the tensor `name`, and how."""
        return converted_name(name.replace("*", "0"), self._mapping, self._model.base_model_prefix, self._own)

    @cached_property
    def _mapping(self) -> Sequence[Any]:
        return conversions(self._model)

    @cached_property
    def _by_place(self) -> dict[tuple[str, str | None], str]:
        return {self._place(name): name for name in sorted(self._names)}

    @cached_property
    def _by_layer(self) -> dict[tuple[str, str | None], str]:
        return {self._place(f"{layer}.weight"): layer for layer in sorted(self._layers)}


def name_others(model: Any, origins: Origins) -> None:
    """Say what parameters that are not quantized are made of, where transformers renames or fuses them."""
    parameters = _stored_tensors(model)
    parts: dict[str, list[StoredPart]] = defaultdict(list)
    for name, origin in origins.whole.items():
        parameter = parameters.get(origin.parameter)
        if parameter is not None and parts_of(parameter) is None and name != origin.parameter:
            start = origin.number * parameter[0].numel() + origin.first * parameter.shape[-1]
            parts[origin.parameter].append(StoredPart((name,), as_stored, start if parameter.dim() == 3 else 0))
    for own, made in parts.items():
        set_parts(parameters[own], tuple(made))
    for own, part in origins.rows.items():
        set_parts(parameters[own], (part,))
    if origins.rows or any(name != origin.parameter for name, origin in origins.whole.items()):
        for own, parameter in parameters.items():
            if parts_of(parameter) is None:
                set_parts(parameter, (StoredPart((own,), as_stored),))
