"""Finds which tensors of a checkpoint's files make each tensor of a model, by names alone, as transformers would rename
them. Refuses files in which that is not unique.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from zeroinf.compat.loading import conversions, converted_name
from zeroinf.errors import ModelError
from zeroinf.model.weights import HeldTensor

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True, slots=True)
class StoredTensors:
    """The tensors in the files of a checkpoint, by the names there."""

    model: str
    """The model's name in messages."""
    tensors: Mapping[str, HeldTensor]

    def without(self, names: Container[str]) -> StoredTensors:
        """These tensors without `names`."""
        return StoredTensors(self.model, {one: tensor for one, tensor in self.tensors.items() if one not in names})

    def refusal(self, what: str, names: Sequence[str], hint: str = "fetch the checkpoint again") -> ModelError:
        """The error for the file of the tensors `names`; `what` is wrong with it."""
        places = sorted({self.tensors[name].file for name in names if name in self.tensors})
        return ModelError(f"{places[0] if places else self.model} {what}", hint=hint)


def trace_names(stored: StoredTensors, model: Any, own_tensors: Mapping[str, torch.Tensor]) -> dict[str, list[str]]:
    """The stored names that each of `own_tensors`, those of `model` by name, is made of.

    Raises ModelError where one is stored twice, or where the numbers of a list, such as experts', have gaps:
    transformers would take the next one for it.
    """
    mapping = conversions(model)
    prefix = model.base_model_prefix
    whole: dict[str, list[str]] = defaultdict(list)
    lists: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in stored.tensors:
        own, pattern = converted_name(name, mapping, prefix, own_tensors)
        if pattern is None:
            whole[own].append(name)
        else:
            lists[own, pattern].append(name)
    twice = {own: names for own, names in whole.items() if own in own_tensors and names[1:]}
    if twice:
        own, names = next(iter(twice.items()))
        raise stored.refusal(f"holds {own} twice, as {' and '.join(names)}{and_more(len(twice), 1)}", names)
    for names in lists.values():
        _refuse_gaps(stored, names)
    for (own, _), names in lists.items():
        whole[own] += names
    return whole


def _refuse_gaps(stored: StoredTensors, names: Sequence[str]) -> None:
    numbers = [[int(number) for number in _NUMBER.findall(name)] for name in names]
    if not names[1:] or len(set(map(len, numbers))) != 1:
        return
    for column in zip(*numbers, strict=True):
        found = set(column)
        if len(found) > 1 and (gaps := sorted(set(range(len(column))) - found)):
            pattern = _NUMBER.sub("*", names[0])
            raise stored.refusal(f"lacks number {gaps[0]} of {pattern}", names)


def repeated_tensors(
    stored: StoredTensors, own_tensors: Mapping[str, torch.Tensor], sources: Mapping[str, Sequence[str]]
) -> set[str]:
    """The model's tensors in layers like one before: of the same shapes, made of the same stored ones.

    What becomes of those becomes of these; converting experts takes transformers a quarter of a millisecond each.
    """
    blocks: dict[str, list[Any]] = defaultdict(list)
    for own, tensor in own_tensors.items():
        made_of = [(_without_block(name), stored.tensors[name].meta.shape) for name in sources.get(own, ())]
        blocks[_block(own)].append((_without_block(own), tensor.shape, tuple(made_of)))
    first = {tuple(parts): number for number, parts in reversed(blocks.items())}
    alike = {number for number, parts in blocks.items() if number and first[tuple(parts)] != number}
    return {own for own in own_tensors if _block(own) in alike}


def _block(name: str) -> str:
    """The number of the block that `name` lies in, as its first one says; empty outside."""
    found = _NUMBER.search(name)
    return found[0] if found else ""


def _without_block(name: str) -> str:
    return _NUMBER.sub("*", name, count=1)


def and_more(count: int, named: int) -> str:
    """The end of a list of `count` things of which the first are `named`."""
    return f" and {count - named} more" if count > named else ""
